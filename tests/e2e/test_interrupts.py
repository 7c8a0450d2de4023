"""Signals and changed settings: what a run saves when it is interrupted, and what `--resume` accepts.

Oracle: the same run without the interruption, to the bit.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from taopd import cli
from taopd.runs.checkpoints import checkpoints, why_incomplete
from taopd.trainer.checkpoint.process_state import RankState
from tests.conftest import write_config
from tests.e2e.test_trainer import CPU, OURS


@pytest.fixture
def write(micro_lab, tmp_path):
    """Writes a config for a run folder and returns its path."""

    def make(name="run", **settings):
        base = CPU | OURS | {"per_device_train_batch_size": 4, "budget": 0.3, "learning_rate": 1e-2}
        settings = base | {"max_steps": 2} | settings
        return str(write_config(micro_lab, tmp_path, name=name, **settings))

    return make


def train(path, *flags):
    return cli.main(["train", "--config", path, "--quiet", "--skip-check", *flags])


def weights(folder):
    return load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_steps_ends_quickly_and_is_resumed_to_the_bit(
    write, tmp_path, how, code
):
    path, run = write(max_steps=2000), tmp_path / "run"
    # A shell's background jobs ignore SIGINT, and so do their children.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from taopd.cli import main; raise SystemExit(main())"
    argv = ["train", "--config", path, "--quiet", "--skip-check"]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *argv], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(how)
    words = process.communicate(timeout=60)[1]
    seconds = time.monotonic() - began
    print(f"signal {how.name}: exit after {seconds:.2f} s")
    assert process.returncode == code, words
    assert "Traceback" not in words
    (saved,) = checkpoints(run)
    assert why_incomplete(saved) is None and f"{saved}; go on with --resume" in words
    steps = int(saved.name.removeprefix("checkpoint-"))
    assert train(write(max_steps=steps + 2), "--resume") == 0
    assert train(write("whole", max_steps=steps + 2)) == 0
    found, truth = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], truth[name]) for name in truth)


MOMENTS = [
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
]


@pytest.fixture
def ctrl_c():
    """Ctrl-C as on a terminal: a shell's background jobs ignore it, and so do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_of_a_step_loses_no_step(
    write, tmp_path, monkeypatch, capsys, ctrl_c, moment, how
):
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    wait = getattr(RankState, moment, None)

    def send(self, args, state, control, **kwargs):
        if wait is not None:
            wait(self, args, state, control, **kwargs)
        if state.global_step == 1 + (moment in ("on_step_end", "on_log")) and not sent:
            sent.append(how)
            signal.raise_signal(how)

    sent = []
    with monkeypatch.context() as patched:
        patched.setattr(RankState, moment, send, raising=False)
        code = train(write(max_steps=4, **divided))
    assert sent == [how] and code == (143 if how == signal.SIGTERM else 130)
    told = capsys.readouterr().err
    # In the middle of an update the step is finished first: weights of no step cannot be saved.
    done = 1 if moment in ("on_step_begin", "on_substep_end") else 2
    (saved,) = checkpoints(tmp_path / "run")
    assert saved.name == f"checkpoint-{done}" and why_incomplete(saved) is None
    assert f"{saved}; go on with --resume" in told
    assert train(write(max_steps=4, **divided), "--resume") == 0
    assert train(write("whole", max_steps=4, **divided)) == 0
    found, truth = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_other_settings_are_listed_and_refused_where_they_change_the_method(
    write, tmp_path, capsys, caplog
):
    saved = {"save_strategy": "steps", "save_steps": 1}
    assert train(write(**saved)) == 0
    config = tmp_path / "run/config.json"
    before, other = config.read_bytes(), saved | {"max_steps": 4, "save_steps": 2}
    capsys.readouterr()
    changed = other | {"budget": 0.5, "loss": "forward_kl", "learning_rate": 2e-2}
    assert train(write(**changed), "--resume") == 2
    told = capsys.readouterr().err
    for words in (
        "budget 0.3 -> 0.5",
        "reverse_kl",
        "learning_rate 0.01 -> 0.02",
        "--resume-with-changes",
    ):
        assert words in told, words
    assert "max_steps" not in told and config.read_bytes() == before
    assert train(write(**other), "--resume") == 0
    assert "settings change at step 2" in caplog.text
    assert train(write(**(changed | {"max_steps": 6})), "--resume-with-changes") == 0
    found = json.loads(config.read_text())
    assert found["budget"] == 0.5 and found["max_steps"] == 6
    first, second = found["changes"]
    assert first["step"] == 2 and second["step"] == 4
    assert first["settings"] == {
        "max_steps": {"before": 2, "after": 4},
        "save_steps": {"before": 1, "after": 2},
    }
    assert second["settings"]["budget"] == {"before": 0.3, "after": 0.5}


def test_the_same_settings_and_the_same_batch_divided_otherwise_are_no_change_of_the_method(
    write, tmp_path
):
    saved = {"save_strategy": "steps", "save_steps": 1}
    assert train(write(**saved)) == 0
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(write(**saved, max_steps=3, **divided), "--resume") == 0
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert train(write(**saved, max_steps=4, **other), "--resume") == 2
    assert train(write(**saved, max_steps=3, **divided), "--resume") == 0
    assert len(json.loads((tmp_path / "run/config.json").read_text())["changes"]) == 1


def test_a_second_process_is_refused_while_a_run_writes(write, tmp_path, capsys):
    from taopd.runs.lock import HOLDER, LOCK

    path = write()
    assert train(path) == 0
    held = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    held += "sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "run" / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    (tmp_path / "run" / HOLDER).write_text('{"pid": 7, "host": "node3", "since": "2026-01-02"}')
    before = sorted(each.name for each in (tmp_path / "run").iterdir())
    for flag in ("--overwrite", "--resume"):
        capsys.readouterr()
        assert train(path, flag) == 2
        assert "in use by process 7 on node3, since 2026-01-02" in capsys.readouterr().err
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == before
    child.communicate()
    assert train(path, "--overwrite") == 0
