"""Students that were changed in memory: what a folder cannot hold is told before training.

Oracle: transformers' own saving and loading of the same model.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_given_student import logprobs, trainer_of
from torch import nn
from transformers import AutoModelForCausalLM

from taopd.errors import ConfigError
from taopd.models.loading import load_model
from tests.conftest import make_model


def _cut(model):
    model.model.layers = model.model.layers[:1]


def _tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def _bias(model):
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(32))


def _narrow(model):
    model.lm_head = nn.Linear(16, 24, bias=False)


def _share(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _normed(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


CHANGES = {
    "cut": (_cut, "layers.1.input_layernorm.weight is asked for .* as 10 others"),
    "tie": (_tie, "lm_head.weight is asked for by its config and would not be in the folder"),
    "bias": (_bias, "layers.0.mlp.up_proj.bias is unknown to its config"),
    "narrow": (_narrow, "lm_head.weight has another shape"),
    "share": (_share, r"layers.0.mlp.gate_proj.weight and model.layers.1.mlp.gate_proj.weight"),
    "normed": (_normed, "layers.0.mlp.up_proj.weight is asked for"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_student_that_no_folder_could_hold_is_refused_before_training(micro_lab, tmp_path, name):
    """It was refused when the folder was loaded, and with shared weights at the first checkpoint."""
    change, message = CHANGES[name]
    model = make_model(seed=3)
    change(model)
    with pytest.raises(ConfigError, match=message) as found:
        trainer_of(micro_lab, tmp_path, model)
    assert "after training" in str(found.value) and "change its config" in str(found.value)
    assert "\n" not in str(found.value)
    try:
        model.save_pretrained(tmp_path / "saved")
    except RuntimeError:
        assert name == "share"
        return
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert any(report.values()), "vacuous"


def _untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def _cut_both(model):
    _cut(model)
    model.config.num_hidden_layers, model.config.layer_types = 1, model.config.layer_types[:1]


@pytest.mark.parametrize(("tied", "change"), [(True, _untie), (False, _cut_both)])
def test_a_change_that_the_folder_holds_is_trained(micro_lab, tmp_path, tied, change, caplog):
    model = make_model(seed=3, tie_word_embeddings=tied)
    change(model)
    trainer = trainer_of(micro_lab, tmp_path, model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logprobs(loaded), logprobs(trainer.model))
    assert "unknown to its config" not in caplog.text and " in memory and " not in caplog.text


def test_what_is_lost_without_a_fault_is_a_warning(micro_lab, tmp_path, caplog):
    """A further head is no part of the language model; a cast rounds rotary frequencies as well."""
    model = make_model(seed=3)
    model.values = nn.Linear(16, 1)
    trainer_of(micro_lab, tmp_path, model)
    assert "the student's values.bias is unknown to its config" in caplog.text
    caplog.clear()
    cast = make_model(seed=3).to(torch.bfloat16)
    trainer_of(micro_lab, tmp_path, cast)
    assert "rotary_emb.inv_freq is bfloat16 in memory and float32 once it is loaded" in caplog.text
    cast.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    now, then = cast.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq
    assert not torch.equal(now.float(), then), "vacuous"


class Own(type(make_model(seed=3))):
    """A class that no config alone makes."""

    def __init__(self, config, size):
        super().__init__(config)
        self.size = size


def test_a_class_of_ones_own_is_trained(micro_lab, tmp_path):
    trainer_of(micro_lab, tmp_path, Own(make_model(seed=3).config, 3)).train()


LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)


def _move(model):
    model.model.layers[0].mlp.up_proj.weight.data.add_(1.0)


@pytest.mark.parametrize("change", [None, _move, _untie])
@pytest.mark.parametrize("own", [False, True], ids=["new", "PeftModel"])
def test_an_adapter_on_weights_that_are_not_its_base_is_told(
    micro_lab, tmp_path, caplog, change, own
):
    """It is saved by the name of that base; whoever loads it would have another student."""
    model = load_model(micro_lab.student, dtype="float32")
    if change:
        change(model)
    trainer = trainer_of(
        micro_lab, tmp_path, *((get_peft_model(model, LORA),) if own else (model, LORA))
    )
    told = "a saved adapter names as its base" in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    off = (
        logprobs(load_model(tmp_path / "saved", dtype="float32")) - logprobs(trainer.model)
    ).abs()
    assert told == bool(change) == bool(off.max() > 1e-3)


def test_a_base_in_fewer_bits_is_the_same(micro_lab, tmp_path, caplog):
    model = load_model(micro_lab.student, dtype="bfloat16")
    trainer_of(micro_lab, tmp_path, model, LORA)
    assert "names as its base" not in caplog.text
