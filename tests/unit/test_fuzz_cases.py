"""Inputs on which a reader once ended with a traceback. Oracle: one `TaopdError`, and nothing written.

Found by `python -m scripts.fuzz.run`; a short run of the same harnesses closes the file.
"""

import base64
import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.fuzz.fence import fence
from scripts.fuzz.odd import Choices
from scripts.fuzz.seeds import make_bank, make_runs, vllm_teacher
from scripts.fuzz.surfaces import STUDY, SURFACES, TRAIN
from taopd.diagnose.bank import FixedContextBank
from taopd.diagnose.bank.manifest import write_manifest, write_parquet
from taopd.diagnose.conformance.check import check_file
from taopd.errors import TaopdError, TeacherError
from taopd.experiments.study.analysis import Question, analyse
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import load_study_file
from taopd.experiments.study.run import base_config
from taopd.report.page import write_report
from taopd.runs.checkpoints import newest_complete, seal
from taopd.trainer.checkpoint.steps_done import steps_done
from taopd.trainer.settings_file import parse_settings

HUGE = int("9" * 400)


@pytest.mark.parametrize(
    "change",
    [
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"model_init_kwargs": "text"},
        {"teacher_model_init_kwargs": ["dtype"]},
        {"max_steps": HUGE},
        {"budget": float("nan")},
        {"output_dir": "a\0b"},
    ],
    ids=str,
)
def test_config_files(change, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(TRAIN | change))
    with pytest.raises(TaopdError):
        parse_settings(str(path), [])


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"name": "x", "max_steps": 1, "max_completion_length": 4}},
        {"config": {"max_steps": None, "max_completion_length": 4}},
        {"config": {"max_steps": [1], "max_completion_length": 4}},
        {"collapse_points": HUGE},
        {"grid": {name: list(range(99)) for name in ("budget", "seed_", "score_top_k")}},
        {"grid": {"selector": ["entropy"], "budget": [0.1] * 101, "score_top_k": list(range(101))}},
    ],
    ids=lambda change: str(change)[:50],
)
def test_study_files(change, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises(TaopdError):
        study = load_study_file(path)
        expand(study, base_config(study))


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    return make_bank(tmp_path_factory.mktemp("fuzz") / "bank")


@pytest.mark.parametrize("key", ["k", "temperature", "vocab_size", "rollouts", "fingerprints"])
@pytest.mark.parametrize("value", [None, "x", [], [0], HUGE, -1], ids=lambda v: str(v)[:6])
def test_manifests_of_banks_whose_hashes_fit(key, value, bank):
    manifest = json.loads((bank / "manifest.json").read_text())
    content = {n: v for n, v in manifest.items() if n not in ("format", "files", "sha256")}
    try:
        write_manifest(bank, "taopd-bank-1", content | {key: value})
        with pytest.raises(TaopdError):
            FixedContextBank.open(bank)
    finally:
        write_manifest(bank, "taopd-bank-1", content)
    FixedContextBank.open(bank)


@pytest.mark.parametrize("name", ["completion", "position", "token_id"])
def test_places_in_banks_are_whole_numbers(name, bank, tmp_path):
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    frame = pq.read_table(folder / "tokens.parquet").to_pandas()
    frame[name] = float("nan")
    write_parquet(folder / "tokens.parquet", {str(key): frame[key].to_numpy() for key in frame})
    content = {n: v for n, v in manifest.items() if n not in ("format", "files", "sha256")}
    write_manifest(folder, "taopd-bank-1", content)
    with pytest.raises(TaopdError, match=f"column '{name}': expected whole numbers"):
        FixedContextBank.open(folder)


@pytest.mark.parametrize(
    "change", [{"K": HUGE}, {"K": 2**40}, {"gamma": HUGE}], ids=lambda v: str(v)[:8]
)
def test_conformance_files(change, tmp_path):
    golden = json.loads((Path(__file__).parents[1] / "golden/topk_lists.json").read_text())[:1]
    golden[0] |= change
    (tmp_path / "x.json").write_text(json.dumps(golden))
    with pytest.raises(TaopdError):
        check_file(tmp_path / "x.json")


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return make_runs(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rollouts.jsonl", "[1]\n"),
        ("rollouts.jsonl", '{"tokens": ["a"], "rank": [1, 2]}\n'),
        ("rollouts.jsonl", '{"tokens": [1]}\n'),
        ("rollouts.jsonl", '{"tokens": ["a"], "kept": ["False"]}\n'),
        ("rollouts.jsonl", '{"tokens": ["a"], "anchored": [{}]}\n'),
        ("rollouts.jsonl", json.dumps({"tokens": ["a"], "kept": [HUGE]}) + "\n"),
        ("rollouts.jsonl", '{"tokens": ["a"], "vocabulary": {"x": "y"}}\n'),
        ("rollouts.jsonl", '{"tokens": ["a"], "student_top": {"ids": [[1]], "logprobs": [[]]}}\n'),
        ("metrics.jsonl", "null\n"),
        ("metrics.jsonl", '{"step": "1"}\n'),
        ("metrics.jsonl", '{"step": 1}\n' + "[" * 9000 + "\n{}\n"),
        ("config.json", '{"changed": [1]}'),
        ("env.json", '{"versions": 1}'),
        ("env.json", '{"git_commit": 5}'),
        ("results.json", '{"arms": [null]}'),
        ("results.json", '{"arms": [{"accuracy_curve": []}]}'),
        ("results.json", '{"arms": [{"accuracy_curve": [[0, 0.5]], "accuracy_greedy": 7}]}'),
        ("manifest.json", '{"format": "taopd-bank-1"}'),
        (
            "manifest.json",
            json.dumps(
                {"checkpoints": [{"gain_forward_nats/mean": HUGE}], "format": "taopd-gain-1"}
            ),
        ),
        ("arm.json", '{"config": 3}'),
        ("verdicts.json", '{"claim": 1}'),
    ],
)
def test_files_of_run_folders(file, text, runs, tmp_path):
    (runs[0] / file).write_text(text)
    with pytest.raises(TaopdError):
        write_report([runs[0]], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


OUTCOME = {
    "name": "[/]",
    "selector": "entropy",
    "budget": 0.1,
    "seed": 0,
    "accuracy_greedy": 0.5,
    "accuracy_curve": [[0, 0.1], [5, 0.5]],
    "accuracy_sampled": 0.4,
    "accuracy_sampled_curve": [[0, 0.1], [5, 0.4]],
}


def test_a_name_that_looks_like_markup_is_shown_as_it_is(capsys, tmp_path):
    from taopd.cli import compare

    (tmp_path / "one").mkdir()
    (tmp_path / "one/results.json").write_text(json.dumps(OUTCOME))
    compare.run([str(tmp_path)])
    assert "[/]" in capsys.readouterr().out


def test_an_outcome_without_a_seed(tmp_path):
    from taopd.cli import compare

    for number, seed in enumerate((None, 0)):
        (tmp_path / f"arm-{number}").mkdir()
        text = json.dumps(OUTCOME | {"seed": seed})
        (tmp_path / f"arm-{number}/results.json").write_text(text)
    with pytest.raises(TaopdError, match="it has no seed"):
        compare.run([str(tmp_path)])


def test_a_min_keep_beyond_every_tensor(tmp_path):
    golden = json.loads((Path(__file__).parents[1] / "golden/topk_lists.json").read_text())[:1]
    selection = golden[0]["selections"][0]
    golden[0]["selections"] = [selection | {"min_keep": 2**70}]
    (tmp_path / "x.json").write_text(json.dumps(golden))
    check_file(tmp_path / "x.json")


def test_an_accuracy_that_one_seed_lacks():
    other = OUTCOME | {"seed": 1}
    del other["accuracy_sampled"]
    arms = analyse([OUTCOME, other])["arms"]
    assert "greedy" in arms[0] and "sampled" not in arms[0]
    with pytest.raises(TaopdError, match="seed 1: it has no accuracy_sampled"):
        analyse([OUTCOME, other], question=Question(metric="sampled"))


def test_bytes_that_are_no_text_and_columns_of_null(runs, tmp_path):
    line = {"tokens": ["a"], "token_ids": [1], "kept": None, "rank": None}
    (runs[0] / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    write_report([runs[0]], tmp_path / "x.html")
    (runs[0] / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(TaopdError, match="no text"):
        write_report([runs[0]], tmp_path / "y.html")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"global_step": null}', '{"global_step": 1.5}', "[" * 9000]
)
def test_the_state_of_a_checkpoint(text, runs):
    checkpoint = runs[0] / "checkpoint-2"
    (checkpoint / "trainer_state.json").write_text(text)
    seal(checkpoint, step=2, num_processes=1)
    with pytest.raises(TaopdError):
        steps_done(checkpoint)
    (checkpoint / "taopd.json").write_text(text)
    assert newest_complete(runs[0])[0] is None


@pytest.mark.parametrize(
    "array",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999), }\n",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3, 2), }\n",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }\n1234",
    ],
    ids=["empty", "magic", "huge", "objects", "short"],
)
def test_arrays_in_answers_of_vllm(array):
    _, transport, score = vllm_teacher(exact=True)
    assert score().want_logprobs.shape == (3, 2)
    packed = base64.b64encode(array).decode()
    transport.damage = lambda answer: answer | {"prompt_token_id_logprobs": packed}
    with pytest.raises(TeacherError):
        score()


# -- the harnesses themselves, shortly -----------------------------------------------------------

SHORT = {"config": 40, "study": 60, "conformance": 120, "bank": 40, "run": 20, "teacher": 300}


@pytest.mark.parametrize("name", SHORT)
def test_changed_inputs_are_read_or_refused(name, tmp_path, monkeypatch):
    """Oracle: an audit hook of the interpreter, and the type of the exception."""
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    (tmp_path / "work").mkdir()
    read = SURFACES[name](tmp_path / "work")
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=SHORT[name],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.binary(min_size=8, max_size=64))
    def one(data):
        try:
            with fence(tmp_path):
                read(Choices(data))
            outcomes["read"] += 1
        except TaopdError:
            outcomes["refused"] += 1

    one()
    assert min(outcomes.values()) > 0, f"vacuous: {outcomes}"


def test_the_same_bytes_are_the_same_input():
    from scripts.fuzz.odd import as_json, changed, torn

    data = random.Random(0).randbytes(64)
    documents = {as_json(changed(TRAIN, Choices(data))) for _ in range(3)}
    assert len(documents) == 1 and documents != {as_json(TRAIN)}
    assert torn(b"some text", Choices(data)) == torn(b"some text", Choices(data))
