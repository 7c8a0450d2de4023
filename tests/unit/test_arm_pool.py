"""The pool runs what has no results, reports steps, and says which arm failed and why."""

import json
import subprocess
import sys

import pytest

from taopd.errors import DataError
from taopd.experiments import pool as arm_pool


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("a", "b", "c")]
    for folder in made:
        folder.mkdir()
    return made


def start_script(body: str):
    """A stand-in for the arm's own process, with the folder as its first argument."""

    def start(folder, *options):
        with open(folder / "log.txt", "w") as log:
            return subprocess.Popen(
                [sys.executable, "-c", body, str(folder)], stdout=log, stderr=log
            )

    return start


DONE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'results.json').write_text('{}')"


def test_finished_arms_are_not_run_again(folders, monkeypatch):
    (folders[1] / "results.json").write_text("kept")
    monkeypatch.setattr(arm_pool, "_start", start_script(DONE))
    seen = []
    arm_pool.run_pool(folders, num_workers=2, progress=lambda folder, step: seen.append(folder))
    assert (folders[1] / "results.json").read_text() == "kept"
    assert (folders[0] / "results.json").exists() and (folders[2] / "results.json").exists()
    assert set(seen) == set(folders)


def test_a_failing_arm_is_named_with_its_last_words(folders, monkeypatch):
    monkeypatch.setattr(arm_pool, "_start", start_script("import sys; sys.exit('no teacher here')"))
    with pytest.raises(DataError, match="stopped with status 1: no teacher here"):
        arm_pool.run_pool(folders, num_workers=1)


def test_logged_steps_reads_the_last_whole_line(tmp_path):
    assert arm_pool.logged_steps(tmp_path) == 0
    lines = [json.dumps({"step": step, "loss": 0.1}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert arm_pool.logged_steps(tmp_path) == 3


def test_the_last_line_is_read_however_long_it_is(tmp_path):
    """An evaluation of 30,000 problems is a line of 60 kB; a page separator is no end of a line."""
    digits = "01" * 15_000
    line = {"step": 7, "accuracy_greedy": 0.5, "right_greedy": digits, "right_sampled": digits}
    text = json.dumps(line) + "\n"
    (tmp_path / arm_pool.CURVE_FILE).write_text(json.dumps({"step": 0}) + "\n" + text)
    assert arm_pool.last_evaluation(tmp_path) == line
    (tmp_path / arm_pool.CURVE_FILE).write_text(text + text[: len(text) // 2])
    assert arm_pool.last_evaluation(tmp_path) == line
    (tmp_path / arm_pool.CURVE_FILE).write_text("x" * 100_000)
    assert arm_pool.last_evaluation(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "words": "a\u2028b"}\n', encoding="utf-8")
    assert arm_pool.logged_steps(tmp_path) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "import os; os.write(1, b'half \\xe2\\x80'); os._exit(1)",
            "status 1: half.*is the disk full",
        ),
        (
            "import os; os.write(1, b'Traceback\\n  x = y\\n'); os._exit(1)",
            r"status 1:   x = y \(its log",
        ),
        ("import os; os._exit(1)", "printed nothing.*is the disk full"),
        (
            # What it had said before is no reason.
            "import os, signal; os.write(1, b'a warning'); os.kill(os.getpid(), signal.SIGKILL)",
            r"was killed.*memory runs out[^:]*\) \(its log: ",
        ),
    ],
)
def test_an_arm_that_was_killed_is_one_clear_message(folders, monkeypatch, body, words):
    monkeypatch.setattr(arm_pool, "_start", start_script(body))
    with pytest.raises(DataError, match=words):
        arm_pool.run_pool(folders, num_workers=1)


def test_every_gpu_gets_its_share_of_the_arms(folders, monkeypatch):
    taken = []

    def start(folder, threads, device):
        taken.append(device)
        return start_script(DONE)(folder)

    monkeypatch.setattr(arm_pool, "_start", start)
    arm_pool.run_pool(folders, num_workers=3, devices=["4", "GPU-x"])
    assert taken == ["4", "GPU-x", "4"]


def test_last_evaluation_is_the_newest_whole_line(tmp_path):
    assert arm_pool.last_evaluation(tmp_path) == {}
    (tmp_path / arm_pool.CURVE_FILE).write_text('{"step": 5, "accuracy_greedy": 0.5}\n{"step": 6,')
    assert arm_pool.last_evaluation(tmp_path) == {"step": 5, "accuracy_greedy": 0.5}
