"""A log that is thinned. Oracle: its own lines, and the log of a run that was never interrupted."""

import json

import pytest

import taopd.runs.bounded_log
from taopd.runs.bounded_log import BoundedLog
from taopd.runs.jsonl import read_jsonl

LIMIT = 4000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(taopd.runs.bounded_log, "MAX_BYTES", LIMIT)


def write(log: BoundedLog, first: int, last: int) -> None:
    for step in range(first, last):
        log.append({"step": step, "loss": 0.5, "text": "x" * 30})
        if step % 50 == 0:
            log.append({"step": step, "eval_loss": 0.25})


def make(path) -> BoundedLog:
    return BoundedLog(path, stays=lambda line: "loss" not in line)


def test_it_stays_below_the_limit_and_shows_the_whole_run(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    log = make(path)
    for step in range(1000):
        write(log, step, step + 1)
        assert path.stat().st_size <= LIMIT
    assert path.stat().st_size > LIMIT / 4
    lines = read_jsonl(path)
    training = [line["step"] for line in lines if "loss" in line]
    assert log.every > 8
    assert training == list(range(0, 1000, log.every))
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(0, 1000, 50))
    assert f"one step of {log.every} is kept" in caplog.text


@pytest.mark.parametrize("saved", [3, 40, 130, 400])
@pytest.mark.parametrize("lost", [1, 30, 300])
def test_resumed_it_reads_as_if_never_interrupted(tmp_path, saved, lost):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    write(make(whole), 0, 1000)
    write(make(part), 0, saved + lost)
    with part.open("a") as stream:
        stream.write('{"step": 7')  # torn by the kill
    resumed = make(part)
    resumed.rewind(saved)
    write(resumed, saved, 1000)
    assert part.read_text() == whole.read_text()


def test_a_line_that_stays_is_not_taken_out_by_size_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    log = make(path)
    for step in range(200):
        log.append({"step": step, "eval_loss": 0.25, "text": "x" * 30})
    assert len(path.read_text().splitlines()) == 200
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 199


@pytest.mark.parametrize("distance", [2, 3, 4])
def test_steps_that_lie_apart_are_thinned_evenly_too(tmp_path, distance):
    path, steps = tmp_path / "x.jsonl", range(1, 2000, distance)
    log = BoundedLog(path, distance=distance)
    for step in steps:
        log.append({"step": step, "text": "x" * 30})
        assert path.stat().st_size <= LIMIT
    kept = [line["step"] for line in read_jsonl(path)]
    assert log.every > 2 and len(kept) > 20
    assert kept == list(steps)[log.every - 1 :: log.every]
    resumed = BoundedLog(path, distance=distance)
    resumed.rewind(2000)
    assert resumed.every == log.every
