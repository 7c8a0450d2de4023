"""`taopd compare` on a micro lab: killed and resumed, the four questions, a full disk.

Oracle of resuming: the results.json of a run that nobody disturbed, byte for byte.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_demo import MICRO

from taopd.cli import main
from taopd.errors import DataError
from taopd.experiments import pool as arm_pool
from taopd.experiments.study.file import parse_study_file
from taopd.experiments.study.run import plan_study, run_study
from taopd.runs import jsonl as records

STUDY = {
    "lab": "dialect",
    "lab_sizes": MICRO,
    "config": {"max_steps": 4, "budget": 0.25},
    "grid": {"selector": ["teachability"]},
    "seeds": [0],
    "evaluate_every": 2,
    "workers": 1,
}


@pytest.fixture(scope="module", autouse=True)
def cache(lab_cache):
    """Every study here is of the micro lab."""


@pytest.fixture(scope="module")
def study_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "micro.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


@pytest.fixture(scope="module")
def undisturbed(study_path):
    """A finished study, run through the command line."""
    output = study_path.parent / "undisturbed"
    assert main(["compare", str(study_path), "--output", str(output)]) == 0
    return output


def running_arms(output: Path) -> list[str]:
    """Processes that run an arm below a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "taopd.experiments.arm" in words and any(str(output) in word for word in words):
            found.append(entry.parent.name)
    return found


@pytest.mark.slow
def test_a_study_leaves_everything_it_promises(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["full", "teachability@25%", "random@25%"]
    assert [row["to"] for row in results["comparisons"]] == ["full", "random", "full"]
    assert results["pairing"]["same_prompts"] is True
    assert "second" not in json.dumps({k: v for k, v in results.items() if k != "question"})
    first = results["outcomes"][0]
    assert first["selected_tokens_curve"][0] == [0, 0] and first["stopped_by"] == "max_steps"
    assert first["selected_tokens_curve"][-1] == [4, first["selected_tokens"]]
    names = {path.name for path in undisturbed.iterdir()}
    expected = {"results.json", "timings.json", "summary.md", "config.json", "env.json"}
    assert expected | {"accuracy.png", "accuracy.svg"} <= names
    rows = records.read_jsonl(undisturbed / "arms" / "full-seed0" / "accuracy.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]


@pytest.mark.slow
def test_killed_at_three_random_moments_and_resumed_it_ends_the_same(
    study_path, undisturbed, forked_arms
):
    output = study_path.parent / "killed"
    moments = random.Random(7)
    for number, how in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)):
        argv = ["compare", str(study_path), "--output", str(output)]
        process = subprocess.Popen(
            [sys.executable, "-m", "taopd", *argv, *(["--resume"] if number else [])],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        while process.poll() is None and not running_arms(output):
            time.sleep(0.05)
        time.sleep(moments.uniform(0.5, 8.0))
        process.send_signal(how)
        words = process.communicate(timeout=60)[1]
        if how != signal.SIGKILL and process.returncode != 0:
            assert process.returncode == (130 if how == signal.SIGINT else 143)
            assert f"arms are finished and kept in {output}" in words
            assert f"taopd compare {study_path} --output {output} --resume" in words
        # An arm that still imports its libraries sees the end of its parent after that.
        deadline = time.monotonic() + 120
        while running_arms(output) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running_arms(output), "a killed study left arms running"
    finished = {path: path.stat().st_mtime_ns for path in output.glob("arms/*/results.json")}
    assert main(["compare", str(study_path), "--output", str(output), "--resume"]) == 0
    assert (output / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


@pytest.mark.slow
def test_a_finished_folder_is_refused_kept_and_guarded(study_path, undisturbed, tmp_path, capsys):
    argv = ["compare", str(study_path), "--output", str(undisturbed)]
    before = (undisturbed / "results.json").read_bytes()
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0  # Nothing left to do.
    assert (undisturbed / "results.json").read_bytes() == before
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(STUDY | {"evaluate_every": 1}))
    assert main(["compare", str(other), "--output", str(undisturbed), "--resume"]) == 2
    assert "finished with other settings (evaluate_every)" in capsys.readouterr().err
    assert main(["compare", str(undisturbed), "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    found = json.loads(before)
    by_name = {arm["name"]: arm for arm in again["arms"]}
    assert by_name == {arm["name"]: arm for arm in found["arms"]}
    assert f"taopd report {tmp_path / 'again'}\n" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "again"), "-o", str(page)]) == 0
    assert "Outcome" in page.read_text() and "Accuracy by cost" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"equal": "selected_tokens", "selected_tokens": 500}, "selected_tokens"),
        ({"equal": "seconds", "seconds": 0.5}, "seconds"),
    ],
    ids=["selected_tokens", "seconds"],
)
def test_equal_tokens_and_equal_seconds(keys, reason, tmp_path, forked_arms):
    config = {"budget": 0.25}
    study = parse_study_file(STUDY | keys | {"config": config, "random_control": False})
    results = run_study(plan_study(study), output=tmp_path / "out", num_workers=1)
    timings = json.loads((tmp_path / "out" / "timings.json").read_text())
    for outcome, timing in zip(results["outcomes"], timings, strict=True):
        assert outcome["stopped_by"] == reason
        assert outcome["accuracy_curve"][-1][0] == outcome["steps"] >= 1
        tokens = [count for _, count in outcome["selected_tokens_curve"]]
        if reason == "selected_tokens":
            per_step = tokens[-1] / outcome["steps"]
            assert 500 <= tokens[-1] < 500 + 2 * per_step
        else:
            assert 0.5 <= timing["train_seconds_curve"][-1][1] < 5.0
    if reason == "selected_tokens":
        full, teach = results["outcomes"]
        assert teach["steps"] > full["steps"]


@pytest.mark.slow
def test_equal_update_norm(tmp_path, forked_arms):
    keys = {"equal": "update_norm", "update_norm": 0.02, "random_control": False}
    results = run_study(plan_study(parse_study_file(STUDY | keys)), output=tmp_path, num_workers=1)
    assert results["question"]["amount"] == 0.02
    for name in ("full-seed0", "teachability@25%-seed0"):
        rows = records.read_jsonl(tmp_path / "arms" / name / "metrics.jsonl")
        # Logged as found; what was applied is the norm times the scale.
        norms = [r["update/norm"] * r["update/scale"] for r in rows if "update/scale" in r]
        assert norms == pytest.approx([0.02] * 4, rel=1e-3)


FULL_DISK = """
import errno, sys
from taopd.experiments import arm as arms
def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
arms.write_json = no_room
sys.argv[0] = "arms"
arms.main()
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_finished_arms(undisturbed, tmp_path, monkeypatch, forked_arms):
    """The second arm cannot write its results; after that there is room again."""
    plan = plan_study(parse_study_file(STUDY))
    output = tmp_path / "out"
    really_start = arm_pool._start

    def start(folder, *options):
        if not (output / "arms/full-seed0/results.json").exists():
            return really_start(folder, *options)
        with open(folder / "log.txt", "w") as log:
            words = [sys.executable, "-c", FULL_DISK, str(folder)]
            return subprocess.Popen(words, stdout=log, stderr=log)

    monkeypatch.setattr(arm_pool, "_start", start)
    with pytest.raises(DataError, match=r"No space left on device.*finished arms are kept"):
        run_study(plan, output=output, num_workers=1)
    monkeypatch.setattr(arm_pool, "_start", really_start)
    kept = (output / "arms/full-seed0/results.json").stat().st_mtime_ns
    assert sorted(path.parent.name for path in output.glob("arms/*/results.json")) == ["full-seed0"]
    assert not list(output.rglob("*.tmp")) and not (output / "results.json").exists()

    really_replace = records.write_text

    def no_room(path, text):
        if path == output / "results.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really_replace(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_text", no_room)
        with pytest.raises(DataError, match="No space left on device; finished arms are kept"):
            run_study(plan, output=output, resume=True, num_workers=1)
    assert not (output / "results.json").exists()
    run_study(plan, output=output, resume=True, num_workers=1)
    assert (output / "arms/full-seed0/results.json").stat().st_mtime_ns == kept
    assert (output / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_an_evaluation_set_without_answers(micro_lab, tmp_path):
    own = {
        **{"student": str(micro_lab.student), "teacher": str(micro_lab.teacher)},
        "prompts": str(micro_lab.prompts),
        "config": {"max_steps": 2, "max_completion_length": 4},
        "grid": {"selector": ["teachability"]},
        "seeds": [0],
        "num_test_prompts": 2,
    }
    plan_study(parse_study_file(own))
    for name, rows, message in (
        ("no-column.jsonl", ['{"prompt": "1 + 1 ="}'] * 2, "no 'answer' column"),
        (
            "hole.jsonl",
            ['{"prompt": "1 +", "answer": "2"}', '{"prompt": "2 +", "answer": null}'],
            "row 1 of the evaluation set has null as its answer",
        ),
        (
            "several.jsonl",
            ['{"prompt": "1 +", "answer": ["2", "two"]}'] * 2,
            "row 0 of the evaluation set has .* as its answer, which is neither text nor a number",
        ),
        ("few.jsonl", ['{"prompt": "1 +", "answer": "2"}'], "has 1 test problems"),
    ):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        with pytest.raises(DataError, match=message):
            plan_study(parse_study_file(own | {"test_prompts": str(tmp_path / name)}))
    with pytest.raises(DataError, match="no such"):
        plan_study(parse_study_file(own | {"teacher": str(tmp_path / "no-teacher")}))


def test_more_test_prompts_than_a_lab_has_are_refused():
    has = MICRO["num_test_prompts"]
    assert plan_study(parse_study_file(STUDY)).runs[0].num_test_prompts == has
    with pytest.raises(DataError, match=f"has {has} test problems: num_test_prompts={has + 1}"):
        plan_study(parse_study_file(STUDY | {"num_test_prompts": has + 1}))


def test_list_and_help(study_path, capsys):
    assert main(["compare", str(study_path), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "3 arms x 1 seed(s)" in shown and "(added control)" in shown
    assert main(["compare", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100


@pytest.mark.slow
def test_what_an_arm_writes_does_not_depend_on_what_it_logs(tmp_path, forked_arms):
    results = []
    for name, more in {"all": {}, "none": {"logging_steps": 100}}.items():
        study = parse_study_file(STUDY | {"config": STUDY["config"] | more})
        results.append(run_study(plan_study(study), output=tmp_path / name, num_workers=1))
    assert results[0] == results[1]
