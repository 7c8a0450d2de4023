"""An adapter over a base that lacks something, or has places that the adapter has nothing for."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from taopd.errors import DataError
from taopd.models.loading import load_model
from taopd.trainer.build.given_student import given_student
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


def test_a_whole_model_beside_an_adapter_is_refused(adapter):
    """transformers would take the base that the adapter names, and pass over the model that lies there."""
    folder = adapter()
    make_model(seed=1).save_pretrained(folder)
    with pytest.raises(DataError, match=r"holds a whole model, model\.safetensors, and an adapter"):
        load_model(folder)


def test_a_config_beside_an_adapter_changes_nothing(adapter):
    folder = adapter(layers=3)
    make_model(seed=1).config.save_pretrained(folder)
    with pytest.raises(DataError, match=r"does not fit its base: it has no .*layers\.2"):
        load_model(folder)


COMMIT = "0123abcd" * 5


def on_hub(folder, cache):
    """The cache of the hub with this folder as somebody/adapter."""
    root = cache / "models--somebody--adapter"
    shutil.copytree(folder, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return {"cache_dir": str(cache), "local_files_only": True}


def test_an_adapter_of_the_hub_is_loaded_as_one_of_a_folder(adapter, tmp_path):
    """With DoRA's magnitudes, which transformers leaves out."""
    folder = adapter(use_dora=True)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    for name in weights:
        weights[name] = weights[name] + 0.5
    save_file(weights, path, metadata={"format": "pt"})
    hub = on_hub(folder, tmp_path / "hub")
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        found = load_model("somebody/adapter", **hub)(ids).logits
        truth = load_model(folder)(ids).logits
    assert torch.equal(found, truth)


def test_a_student_is_an_adapter_of_the_revision_that_is_asked_for(adapter, tmp_path):
    """TRL would load a name that `main` does not have as an adapter by itself."""
    hub = on_hub(adapter(), tmp_path / "hub")
    (tmp_path / "hub/models--somebody--adapter/refs/main").rename(
        tmp_path / "hub/models--somebody--adapter/refs/tuned"
    )
    args = SimpleNamespace(model_init_kwargs=hub | {"revision": "tuned"})
    given = given_student("somebody/adapter", args, make_tokenizer(), None)
    trains = [name for name, weight in given.model.named_parameters() if weight.requires_grad]
    assert trains and all("lora" in name for name in trains)


def test_a_damaged_base_of_an_adapter_of_the_hub_is_refused(adapter, tmp_path):
    folder = adapter()
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"the base of the adapter somebody/adapter: .*1 tensors"):
        load_model("somebody/adapter", **on_hub(folder, tmp_path / "hub"))


def test_an_adapter_of_the_hub_without_safetensors_is_refused(adapter, tmp_path):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    hub = on_hub(folder, tmp_path / "hub")
    # How the cache remembers that the hub has no such file.
    missing = tmp_path / "hub/models--somebody--adapter/.no_exist" / COMMIT
    missing.mkdir(parents=True)
    (missing / "adapter_model.safetensors").touch()
    with pytest.raises(DataError, match=r"the adapter somebody/adapter has no adapter_model\.safe"):
        load_model("somebody/adapter", revision=COMMIT, **hub)
