"""The launch recipes. Oracles: accelerate's own reader of config files, and a `taopd train` run under it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from tests.conftest import write_config

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
SCRIPT = Path(__file__).parent / "launched_on_cpu.py"
KNOWN = {
    "fsdp2-8gpu": {"use_fsdp": True, "num_processes": 8, "num_machines": 1, "fsdp_version": 2},
    "fsdp2-multinode": {
        "use_fsdp": True,
        "num_processes": 64,
        "num_machines": 8,
        "fsdp_version": 2,
    },
    "zero3": {"use_deepspeed": True, "num_processes": 8, "num_machines": 1, "zero_stage": 3},
}


def test_every_recipe_is_known():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_accelerate_reads_the_recipe(name):
    path = str(RECIPES / f"{name}.yaml")
    load_config_from_file(path)
    parsed = launch_command_parser().parse_args(
        ["--config_file", path, "-m", "taopd", "train", "--config", "x.yaml"]
    )
    arguments, _, _ = _validate_launch_command(parsed)
    for key, value in KNOWN[name].items():
        found = getattr(arguments, key)
        assert type(value)(found) == value, key
    assert arguments.training_script == "taopd"


@pytest.mark.slow
def test_taopd_trains_under_accelerate_launch_with_fsdp2(micro_lab, tmp_path):
    settings = {
        "gradient_checkpointing": False,
        "max_steps": 1,
        "max_completion_length": 6,
        "score_top_k": 4,
        "budget": 0.2,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }
    config = write_config(micro_lab, tmp_path, **settings)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(RECIPES / "fsdp2-8gpu.yaml"), "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", str(SCRIPT), "train"]
    done = subprocess.run(
        [*command, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "several processes train it" in done.stderr
    before = load_file(micro_lab.student / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"]), "the head must train"
