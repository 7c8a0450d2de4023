"""Lines of progress: at least one every so many seconds, with a right estimate."""

import io
import sys
import time

import pytest

from taopd import cli
from taopd.cli.progress import CountedProgress
from taopd.runs import heartbeat
from taopd.runs.heartbeat import Heartbeat
from taopd.trainer.step_lines import StepLines


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.1)


def lines_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_a_silent_command_says_that_it_runs(capsys, quick):
    with Heartbeat("bench"):
        time.sleep(0.55)
    lines = lines_of(capsys)
    assert 3 <= len(lines) <= 6 and lines[0] == "taopd bench: running, 0:00:00 so far"
    with Heartbeat("bench") as beat:
        beat.mute()
        time.sleep(0.3)
    assert lines_of(capsys) == []


@pytest.mark.parametrize(
    ("loaded_before", "quiet", "loads", "says"),
    [
        (False, False, True, True),
        (True, False, True, False),
        (False, True, True, False),
        (False, False, False, False),
    ],
    ids=["loads", "is loaded already", "quiet", "loads nothing heavy"],
)
def test_the_first_word_comes_while_libraries_load(
    capsys, monkeypatch, loaded_before, quiet, loads, says
):
    """Oracle: a library that is there after the command has begun, and not before."""
    monkeypatch.setattr(heartbeat, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "HEAVY", ("a_heavy_library",))
    if loaded_before:
        monkeypatch.setitem(sys.modules, "a_heavy_library", io)
    with Heartbeat("train", quiet=quiet):
        if loads:
            monkeypatch.setitem(sys.modules, "a_heavy_library", io)
        time.sleep(0.3)
    assert lines_of(capsys) == ["taopd train: loading libraries"] * says


def test_every_command_has_a_heartbeat(capsys, quick, monkeypatch):
    monkeypatch.setattr("taopd.cli.conformance.run", lambda argv: time.sleep(0.4) or 0)
    assert cli.main(["conformance"]) == 0
    assert "taopd conformance: running" in capsys.readouterr().err


def test_counted_work_in_a_log_file_has_lines_with_the_time_left(capsys, quick, monkeypatch):
    """From the first unit on, however long it takes; rows that are done are told at once."""
    clock = [0.0]
    monkeypatch.setattr("taopd.cli.progress.time.monotonic", lambda: clock[0])
    with CountedProgress() as advance:
        advance("teacher", 0, 2)
        assert advance._words() == "teacher 0/2, left ?"
        clock[0] = 40.0
        advance("teacher", 1, 2)
        assert advance._words() == "teacher 1/2, left 0:00:40"
        advance("arms", 100, 300)
        clock[0] = 50.0
        advance("teacher", 2, 2)
        advance("arms", 150, 300)
        assert advance._words() == "arms 150/300, left 0:00:30"
    assert lines_of(capsys) == ["teacher 2/2"]


class State:
    is_world_process_zero, global_step, max_steps = True, 0, 4


def test_steps_have_a_line_between_two_logs_and_a_run_shorter_than_logging_steps_has_one(
    quick, capsys
):
    stream = io.StringIO()
    lines, state = StepLines(stream), State()
    with Heartbeat("train"):
        lines.on_train_begin(None, state, None)
        time.sleep(0.25)
        state.global_step = 1
        time.sleep(0.25)
        lines.on_train_end(None, state, None)
    said = lines_of(capsys)
    assert "taopd train: step 0 of 4 done, left ?, 0:00:00 so far" in said
    assert any("step 1 of 4 done, left 0:00:0" in line for line in said)
    assert stream.getvalue() == ""
    state.global_step = 4
    lines.on_log(None, state, None, logs={"train_loss": 1.5})
    assert stream.getvalue() == "step 4/4  loss 1.5  left 0:00:00\n"
    lines.on_log(None, state, None, logs={"train_loss": 1.5})
    assert len(stream.getvalue().splitlines()) == 1


def test_the_next_lab_of_a_row_is_not_timed_from_the_first(monkeypatch):
    """Labs are built one after the other, each with a row "teacher". Oracle: 3 s for 10 steps."""
    clock = [0.0]
    monkeypatch.setattr("taopd.cli.progress.time.monotonic", lambda: clock[0])
    with CountedProgress() as advance:
        for lab in range(3):
            for done in (10, 20, 30, 100):
                clock[0] += 3.0 if done < 100 else 600.0
                advance("teacher", done, 100)
                if done == 30:
                    assert advance._words() == "teacher 30/100, left 0:00:21", lab
