"""Two processes choose the same tokens and take the same step as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "rank_worker.py"


def launch(micro_lab, out: Path, num_ranks: int, settings: dict) -> tuple[dict, dict]:
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", str(WORKER), str(micro_lab.root), str(out)]
    result = subprocess.run(
        [*command, json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(out / "state.safetensors"), json.loads((out / "loss.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1])
def test_two_ranks_equal_one(micro_lab, tmp_path, window):
    settings = {"budget": 0.2, "anchor_coef": 0.5, "gradient_accumulation_steps": 1}
    settings |= {"gradient_window": window, "gradient_check_every": 0 if window is None else 1}
    one, one_log = launch(
        micro_lab, tmp_path / "one", 1, settings | {"per_device_train_batch_size": 8}
    )
    two, two_log = launch(
        micro_lab, tmp_path / "two", 2, settings | {"per_device_train_batch_size": 4}
    )
    assert torch.equal(one.pop("kept"), two.pop("kept"))
    assert torch.equal(one.pop("anchors"), two.pop("anchors"))
    start = load_file(micro_lab.student / "model.safetensors")
    steps = [
        torch.cat([(state[f"model.{name}"] - start[name]).flatten() for name in start])
        for state in (one, two)
    ]
    assert steps[0].norm() > 0, "vacuous"
    assert (steps[0] - steps[1]).norm() / steps[0].norm() < 1e-5
    for key in ("select/kept_fraction", "signal/disagreement_nats/p90", "select/valid_tokens"):
        assert one_log[key] == pytest.approx(two_log[key], rel=1e-6), key
