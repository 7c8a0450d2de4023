"""An adapter over a base that lacks something, or has places that the adapter has nothing for."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from taopd.errors import DataError
from taopd.models.loading import load_model
from tests.conftest import make_model, make_tokenizer


@pytest.fixture
def adapter(tmp_path):
    """Saves an adapter of a model of two layers over a base of as many layers as asked for."""

    def make(layers=2, **options):
        make_model(seed=0).save_pretrained(tmp_path / "trained")
        base, folder = tmp_path / "base", tmp_path / "adapter"
        make_model(seed=0, layers=layers).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        get_peft_model(model, lora).save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0]}],
    ids=str,
)
def test_an_adapter_over_its_own_base_loads(adapter, options):
    folder = adapter(**options)
    load_model(folder)


def test_a_base_with_more_layers_than_the_adapters_is_refused(adapter):
    folder = adapter(layers=3)
    with pytest.raises(DataError, match=r"does not fit its base: it has no .*layers\.2"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lacks", "are incomplete: 1 tensors are missing"),
        ("another shape", "do not fit its config"),
    ],
)
def test_a_damaged_base_is_refused_as_it_is_without_an_adapter(adapter, change, said):
    """transformers fills the place with random numbers, and reports on the adapter alone."""
    folder = adapter()
    path, name = folder.parent / "base" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(path)
    shape = weights.pop(name).shape
    if change == "another shape":
        weights[name] = torch.zeros(shape[0], shape[1] // 2)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"the base of the adapter .*base.* {said}"):
        load_model(folder)


def test_a_missing_base_is_named_with_its_adapter(adapter):
    folder = adapter()
    (folder.parent / "base" / "config.json").rename(folder.parent / "elsewhere.json")
    with pytest.raises(DataError, match=r"the base of the adapter .*base is no model folder"):
        load_model(folder)
