"""Inits of LoRA that change the weights below the adapter. Oracle: W + B A, added up from the saved file.

A tool that serves adapters knows the base on disk and two matrices, and nothing of an init. With a random
one (`pissa_niter_4`) peft itself loaded another model than the one that was trained.
"""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_given_student import adapter, base_of, logprobs, trainer_of
from test_trainer import weights_of

from taopd.errors import ConfigError
from taopd.models.loading import load_model

__all__ = ["adapter"]
TARGETS = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}


def served(lab, folder):
    """The base on disk with the adapter's two matrices added, as a tool without peft does it."""
    model, config = base_of(lab), json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["init_lora_weights"] is True and not config["use_dora"]
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = config["alpha_pattern"][module] / config["rank_pattern"][module]
        change = scale * tensors[name.replace("lora_A", "lora_B")] @ a
        model.get_submodule(module).weight.data += change
    return model


@pytest.mark.parametrize("below", ["a model", "an adapter"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_is_saved_is_an_adapter_of_the_base_on_disk(micro_lab, tmp_path, adapter, init, below):
    given = str(adapter if below == "an adapter" else micro_lab.student)
    config = LoraConfig(**TARGETS, init_lora_weights=init, task_type="CAUSAL_LM")
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(micro_lab, tmp_path, given, config, **saving)
    start = logprobs(load_model(given, dtype="float32"))
    torch.testing.assert_close(logprobs(trainer.model), start, atol=1e-4, rtol=0)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = logprobs(trainer.model)
    assert (expected - start).abs().max() > 1e-2, "vacuous"
    for found in (
        served(micro_lab, tmp_path / "saved"),
        load_model(tmp_path / "saved", dtype="float32"),
    ):
        torch.testing.assert_close(logprobs(found), expected, atol=1e-4, rtol=0)
    again = trainer_of(micro_lab, tmp_path / "again", given, config, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    now = weights_of(trainer)
    assert all(torch.equal(weight, now[name]) for name, weight in weights_of(again).items())


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_with_more_than_two_matrices_it_is_refused_before_training(micro_lab, tmp_path, more):
    config = LoraConfig(**TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM", **more)
    named = rf"init_lora_weights='pissa' .*; with {next(iter(more))} .* leave one of the two out"
    with pytest.raises(ConfigError, match=named):
        trainer_of(micro_lab, tmp_path, str(micro_lab.student), config)


def test_an_adapter_that_doubles_layers_is_refused_before_training(micro_lab, tmp_path):
    config = LoraConfig(**TARGETS, layer_replication=[[0, 2], [0, 2]], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"layer_replication: .* leave it out"):
        trainer_of(micro_lab, tmp_path, str(micro_lab.student), config)
