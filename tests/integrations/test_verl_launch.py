"""The example launch script against verl's own config."""

from pathlib import Path

import pytest

pytest.importorskip("verl", reason="make test-verl")

import tests.integrations.cpu_platform  # noqa: F401 (before verl's workers)

# isort: split
from hydra import compose, initialize_config_module
from verl.utils.config import omega_conf_to_dataclass

from taopd.integrations.verl import VerlSettings
from taopd.integrations.verl.trainer import read_settings

SCRIPT = Path(__file__).parents[2] / "recipes" / "verl" / "launch.sh"


def overrides():
    """What the script passes to verl's main, its variables replaced."""
    block = SCRIPT.read_text().partition("settings=(\n")[2].partition("\n)\n")[0]
    lines = [line.strip().replace('"', "") for line in block.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for name in ("STUDENT", "TEACHER", "DATA"):
        lines = [line.replace(f"${name}", f"/x/{name.lower()}") for line in lines]
    return lines


def test_verls_config_takes_the_launch_script_and_gives_our_settings():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides())
    assert read_settings(config) == VerlSettings()
    distillation = omega_conf_to_dataclass(config.distillation)
    (teacher,) = distillation.teacher_models.values()
    assert teacher.model_path == "/x/teacher"
    assert distillation.distillation_loss.loss_settings.use_topk
