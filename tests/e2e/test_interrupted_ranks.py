"""A signal to one of two processes: both agree at the end of the step, save one checkpoint, and exit.

Oracle: the run of two processes that was not interrupted, to the bit.
"""

import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from scripts.reliability.forked import ForkedRun, until
from taopd.runs.checkpoints import checkpoints, why_incomplete
from tests.conftest import write_config
from tests.e2e.test_trainer import CPU, OURS


@pytest.fixture
def start(micro_lab, tmp_path):
    """Starts `taopd train` in two processes over gloo; returns the run and its log."""

    def run(name: str, steps: int, *flags: str) -> tuple[ForkedRun, str]:
        settings = CPU | OURS | {"per_device_train_batch_size": 2, "budget": 0.3}
        settings |= {"learning_rate": 1e-2, "max_steps": steps}
        path = write_config(micro_lab, tmp_path, name=name, **settings)
        log = tmp_path / f"{name}.log"
        argv = ["train", "--config", str(path), "--skip-check", "--quiet", *flags]
        return ForkedRun(argv, log, 2, fsdp2=False), log

    return run


@pytest.mark.parametrize(
    ("number", "to", "code"), [(signal.SIGTERM, (0, 1), 143), (signal.SIGINT, (1,), 130)]
)
def test_two_processes_save_one_checkpoint_together(start, tmp_path, capfd, number, to, code):
    """As launchers send it, to all; and to a single one that is not the first."""
    run, log = start("run", 500)
    metrics = tmp_path / "run/metrics.jsonl"
    assert until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or run.code()) is True
    for place in to:
        run.send(number, place)
        time.sleep(0.05)  # one process hears of it later, perhaps a step later
    assert run.wait() == code, log.read_text()
    # A forked process has the captured stderr of pytest.
    told = log.read_text() + capfd.readouterr().err
    assert "Traceback" not in told
    (saved,) = checkpoints(tmp_path / "run")
    assert why_incomplete(saved) is None
    assert told.count("interrupted in") == 1 and f"{saved}; go on with --resume" in told
    done = int(saved.name.removeprefix("checkpoint-"))
    assert 1 <= done < 500
    # To the bit as if nothing had happened.
    assert start("run", done + 1, "--resume")[0].wait() == 0
    assert start("whole", done + 1)[0].wait() == 0
    found, truth = (
        load_file(tmp_path / f"{name}/model/model.safetensors") for name in ("run", "whole")
    )
    assert all(torch.equal(found[name], truth[name]) for name in truth)
