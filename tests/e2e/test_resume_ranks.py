"""Two processes (DDP, gloo). Oracle: the run that was never interrupted, and the other rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "resume_worker.py"


@pytest.mark.slow
def test_two_ranks_resume_skip_and_stop_together(micro_lab, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(micro_lab.root), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for found in (one, two):
        assert found["resumed"] == found["whole"] == found["after_stop"] == one["whole"]
        assert found["after_skip"] == one["after_skip"] != one["whole"]
        assert found["skipped"] == [0.0, 1.0, 0.0, 0.0]
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= files
    assert "on another process" in one["stopped"]
    assert "loss term: the loss is NaN or infinite" in two["stopped"]
    assert all("2 steps are saved in" in found["stopped"] for found in (one, two))
    about = json.loads((tmp_path / "stop/bad_numbers/step-000002-rank-1.json").read_text())
    assert about["process"] == 1 and about["position"] is not None
