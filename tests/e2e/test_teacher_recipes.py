"""The recipes of docs/teachers.md run, on micro models and for one step. Oracle: what the run leaves."""

import importlib.util
import json
from pathlib import Path

import pytest

from taopd import cli
from tests.gguf_files import make_llama, write_gguf
from tests.unit.test_quantized_teacher import wide  # noqa: F401 (a fixture)

RECIPES = Path(__file__).parents[2] / "recipes"
PACKAGES = {"teacher-gguf": "gguf", "teacher-quantized": "bitsandbytes", "teacher-offload": "torch"}
SMALL = {
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "max_steps": 1,
    "score_top_k": 4,
    "budget": 0.3,
    "teacher_model_init_kwargs": '{"dtype": "float32"}',
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_recipe_trains(name, wide, micro_lab, tmp_path, monkeypatch):  # noqa: F811
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"the package {PACKAGES[name]} is not installed")
    monkeypatch.chdir(tmp_path)
    teacher = wide
    if name == "teacher-gguf":
        teacher = tmp_path / "teacher.gguf"
        write_gguf(make_llama(seed=1), teacher, packed=True)
    settings = SMALL | {
        "model_name_or_path": micro_lab.student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": micro_lab.prompts,
        "output_dir": tmp_path / "run",
    }
    flags = [str(x) for key, value in settings.items() for x in (f"--{key}", value)]
    assert (
        cli.main(["train", "--config", str(RECIPES / f"{name}.yaml"), "--skip-check", *flags]) == 0
    )
    (line, *_) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1 and 0.0 < line["loss"] < 20.0
    written = json.loads((tmp_path / "run/config.json").read_text())
    recipe = (RECIPES / f"{name}.yaml").read_text()
    for key in ("teacher_offload", "teacher_quantization"):
        assert f"{key}: {written[key]}" in recipe or written[key] is None
