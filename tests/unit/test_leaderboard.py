"""The leaderboard: its bookkeeping on a tiny run, its ranks and gaps by hand."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from taopd.cli import main
from taopd.errors import ConfigError, DataError
from taopd.experiments.lab.leaderboard import _stem, entries, merge, run_leaderboard
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.report.figures import leaderboard as page
from taopd.report.generated_part import END

SIZES = {
    "num_train_prompts": 64,
    "num_test_prompts": 8,
    "teacher_steps": 2,
    "student_steps": 2,
}


def cell(selector, variant, greedy, budget=0.05, loss="reverse_kl"):
    curves = [[0.5, *run] for run in greedy]
    return {
        "variant": variant,
        "loss": loss,
        "selector": selector,
        "budget": budget,
        "seeds": list(range(len(greedy))),
        "steps": [0, 1, 2],
        "greedy": curves,
        "sampled": curves,
        "kept_fraction": budget,
        "kept_by_kind": {},
        "cpu_seconds": 1.0,
    }


@pytest.fixture
def board():
    cells = [
        cell("full", "dialect", [[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]], budget=1.0),
        cell("full", "reversal", [[0.6, 0.8], [0.6, 0.8], [0.6, 0.7]], budget=1.0),
        cell("better", "dialect", [[1.0, 1.0], [0.9, 0.91], [0.8, 0.8]]),
        cell("better", "reversal", [[0.6, 0.8], [0.6, 0.8], [0.6, 0.7]]),
        cell("worse", "dialect", [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
        cell("worse", "reversal", [[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]]),
    ]
    settings = {
        "steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "test_prompts": 1,
    }
    return {"settings": settings, "cells": cells}


def test_scores_leave_out_the_student_before_training(board):
    assert page.scores(board["cells"][0]).tolist() == pytest.approx([90, 80, 70])
    assert page.finals(board["cells"][1]).tolist() == pytest.approx([80, 80, 70])


def test_ranks_gaps_and_verdict(board):
    cells = page.select_cells(board, "reverse_kl", 0.05)
    order = page.ranking(cells, ["dialect", "reversal"])
    # dialect: worse 1, better 2, full 3; reversal: better and full 1.5, worse 3.
    assert order == [(1.75, "better"), (2.0, "worse"), (2.25, "full")]
    gap, where = page.worst_gap(cells, "worse", ["dialect", "reversal"])
    assert where == "reversal" and gap == pytest.approx(-65.0)
    words = page.verdict(board, 0.05)
    assert "not worse than full in any variant: better." in words
    assert page.marks(cells, ["better", "worse"], "reversal") == {"better": "", "worse": "▼"}


def test_an_entry_of_fewer_seeds_is_paired_on_those_it_has(board):
    cells = page.select_cells(board, "reverse_kl", 0.05)
    short = cells["worse"]["reversal"]
    short["seeds"], short["greedy"] = [2, 1], short["greedy"][:0:-1]
    # Seed 2: 5 less 65; seed 1: 5 less 70.
    assert page.differences(cells, "worse", "reversal").tolist() == pytest.approx([-60, -65])
    short["seeds"] = [8, 9]
    assert page.differences(cells, "worse", "reversal") is None


def test_page_keeps_what_was_written_by_hand(board, tmp_path):
    path = tmp_path / "board.md"
    page.write_page(board, path, "board.png")
    path.write_text(path.read_text().replace(END, END + "\n\nMy discussion.\n"))
    page.write_page(board, path, "board.png")
    text = path.read_text()
    assert text.count("## Exact reverse kl") == 1 and text.count("My discussion.") == 1
    page.draw(board, tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_entries_with_more_or_fewer_variants_hide_nobody(board, tmp_path):
    rest = [
        cell("new", "dialect", [[1.0, 1.0]] * 3),
        cell("new", "accent", [[1.0, 1.0]] * 3),
    ]
    board["cells"] += rest
    assert page.variants_of(board) == ["dialect", "reversal"]
    rows = page.table(board, "reverse_kl", 0.05).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["better", "worse", "full", "new"]
    assert [row.split("|")[1].strip() for row in rows] == ["1.8", "2.0", "2.2", "-"]
    assert rows[-1].split("|")[3:5] == [" 100 ±0 → 100 ", " - "]
    assert "no columns here: *accent* (1)." in page.generated(board, "board.png")
    page.draw(board, tmp_path / "board.png")


def test_what_trains_every_token_with_another_loss_is_shown_and_not_counted_at_5_percent(board):
    board["cells"] += [
        cell("full, other", variant, [[1.0, 1.0]] * 3, budget=1.0)
        for variant in ("dialect", "reversal")
    ]
    rows = page.table(board, "reverse_kl", 0.05).splitlines()[2:]
    assert next(row.split("|")[2].strip() for row in rows) == "full, other"
    assert "not worse than full in any variant: better." in page.verdict(board, 0.05)
    assert "### Budget 100%" not in page.generated(board, "board.png")


@pytest.mark.slow
def test_a_new_selector_runs_its_own_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TAOPD_CACHE", str(tmp_path / "cache"))
    path, seen = tmp_path / "tinylab.json", []
    common = {
        "folder": tmp_path / "jobs",
        "path": path,
        "variants": ["dialect"],
        "num_seeds": 2,
        "steps": 1,
        "num_workers": 1,
        "lab_sizes": SIZES,
    }
    assert (
        run_leaderboard(names=["full, TV-OPD"], **common)["cells"][0]["selector"] == "full, TV-OPD"
    )
    rows = [(c["loss"], c["budget"]) for c in json.loads(path.read_text())["cells"]]
    assert rows == [("sampled_reverse_kl", 1.0)], "its loss is a kind of the sampled one"
    path.unlink()
    run_leaderboard(names=["full"], **common)
    before = sorted((tmp_path / "jobs").glob("*full.json"))
    stamps = [file.stat().st_mtime_ns for file in before]
    board = run_leaderboard(
        names=["full", "random"], progress=lambda *event: seen.append(event), **common
    )
    assert [file.stat().st_mtime_ns for file in before] == stamps
    assert ("jobs", 2, 4) in seen and seen[-1] == ("jobs", 4, 4)
    found = {(c["selector"], c["loss"], c["budget"]) for c in board["cells"]}
    assert len(board["cells"]) == len(found) == 2 + 2 * 4
    assert all(c["seeds"] == [0, 1] and len(c["greedy"][0]) == 2 for c in board["cells"])
    assert json.loads(path.read_text())["cells"] == board["cells"]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"teachabilty.*teachability"):
        entries(["teachabilty"])
    with pytest.raises(ConfigError, match=r"no lab is called 'dialct'.*dialect"):
        run_leaderboard(folder=tmp_path, path=tmp_path / "x.json", variants=["dialct"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a leaderboard"):
        merge(tmp_path / "x.json", [])


@pytest.mark.parametrize("flag", ["--workers", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_no_workers_or_seeds_are_refused_before_a_lab_is_built(tmp_path, capsys, flag, value):
    place = ["--jobs", str(tmp_path / "j"), "--into", str(tmp_path / "x.json")]
    assert main(["leaderboard", flag, value, *place]) == 2
    assert flag in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [["--selector", "teachabilty"], ["--variant", "dialct"], ["--seeds", "0"]]
)
def test_a_name_that_is_refused_leaves_no_folder(tmp_path, capsys, wrong):
    place = ["--jobs", str(tmp_path / "j"), "--into", str(tmp_path / "a/x.json")]
    assert main(["leaderboard", *wrong, *place]) == 2
    assert "error" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_folders_that_cannot_be_made_are_named(tmp_path, capsys):
    (tmp_path / "f").write_text("")
    for jobs, into in (("f/j", "x.json"), ("j", "f/a/x.json")):
        place = ["--jobs", str(tmp_path / jobs), "--into", str(tmp_path / into)]
        assert main(["leaderboard", *place]) == 2
        assert f"cannot write to '{tmp_path / 'f'}" in capsys.readouterr().err


def test_jobs_in_a_file_are_refused(tmp_path, capsys):
    (tmp_path / "j").write_text("")
    place = ["--jobs", str(tmp_path / "j"), "--into", str(tmp_path / "x.json")]
    assert main(["leaderboard", *place]) == 2
    assert f"--jobs {tmp_path / 'j'} is a file" in capsys.readouterr().err


def test_rows_of_other_settings_are_not_mixed(tmp_path, board):
    path = tmp_path / "x.json"
    assert merge(path, [])["cells"] == []
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(board | {"settings": saved["settings"] | {"steps": 30}}))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"other settings \(steps\)"):
        merge(path, [])
    assert path.read_bytes() == before
    path.write_text(json.dumps(board | {"settings": saved["settings"]}))
    assert len(merge(path, [])["cells"]) == 6


def test_a_long_expression_has_a_file_of_its_own():
    long = "+".join(["0.125*teachability"] * 25)
    stems = {_stem(f"dialect__reverse_kl__{name}") for name in (long, f"{long}+tip", "tip")}
    assert len(stems) == 3 and max(map(len, stems)) <= 150
    assert "dialect__reverse_kl__tip" in stems


def test_finished_jobs_are_not_run_again(tmp_path):
    path = tmp_path / "done.json"
    path.write_text('{"arms": []}')
    seen = []
    run_jobs([Job(path=path, arms=[], about={})], progress=lambda *event: seen.append(event))
    assert seen == [(1, 1)]


ENDLESS = """
import os, time
from pathlib import Path
from taopd.experiments.lab.stacked import jobs

def endless(job):
    job.path.with_name("pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    jobs.run_job = endless
    jobs.run_jobs([jobs.Job(path=Path("job.json"), arms=[], about={})], num_workers=1)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_worker(tmp_path, how):
    (tmp_path / "endless.py").write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, "endless.py"], cwd=tmp_path)
    written = tmp_path / "pid"
    assert happens(lambda: written.exists() and written.read_text())
    worker = psutil.Process(int(written.read_text()))
    parent.send_signal(how)
    parent.wait()
    assert happens(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def happens(what, seconds=60):
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
