"""Mixtures of experts as students: one tensor for all experts in memory, in a checkpoint one for each.

Oracle: the run that was never stopped, the files themselves, and the adapter as it was.
"""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_given_student import logprobs, trainer_of
from test_resume import SAVED, assert_same_weights
from test_trainer import make_trainer, weights_of
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from taopd.errors import ConfigError
from taopd.models.loading import load_model
from taopd.models.prompts import load_prompts
from tests.conftest import WORDS, make_tokenizer

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
KINDS = {
    "qwen3": (
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 8, "output_router_logits": True},
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    "deepseek": (
        DeepseekV3Config,
        {
            **LATENT,
            **{"v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 8},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        },
    ),
}
EXPERTS = {"r": 2, "target_modules": ["q_proj", "up_proj", "down_proj", "gate_proj"]}


@pytest.fixture
def lab_of(micro_lab, tmp_path):
    """The micro lab with a mixture of experts as its student."""
    from transformers import AutoModelForCausalLM

    def make(kind):
        config, sizes = KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            student = AutoModelForCausalLM.from_config(config(**(SIZES | sizes)))
            for weight in student.parameters():
                if weight.ndim > 1:
                    torch.nn.init.normal_(weight, std=0.3)
        student.save_pretrained(tmp_path / "student")
        make_tokenizer().save_pretrained(tmp_path / "student")
        return replace(micro_lab, student=tmp_path / "student")

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_are_those_of_the_checkpoint(lab_of, tmp_path, kind):
    """transformers' trainer looked for the file's names in the model, and left the experts untrained."""
    lab, settings = lab_of(kind), SAVED | {"max_steps": 3}
    whole = make_trainer(lab, tmp_path, **settings)
    before = {name: weight.clone() for name, weight in weights_of(whole).items()}
    whole.train()
    expected = weights_of(whole)
    experts = [name for name in expected if "experts" in name]
    assert all((expected[name] - before[name]).abs().max() > 1e-3 for name in experts) and experts
    assert "experts.0" in " ".join(load_file(tmp_path / "run/checkpoint-2/model.safetensors"))
    part = make_trainer(lab, tmp_path, **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same_weights(part, expected)


def test_the_best_experts_are_loaded_at_the_end(lab_of, tmp_path):
    lab = lab_of("qwen3")
    trainer = make_trainer(
        lab,
        tmp_path,
        **SAVED | {"learning_rate": 1.0, "max_steps": 2},
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_dataset=load_prompts(str(lab.prompts), split="test"),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1"), "vacuous: the last one is the best"
    stored = load_model(best, dtype="float32")
    assert_same_weights(trainer, {name: w.detach() for name, w in stored.named_parameters()})


@pytest.mark.parametrize("new", [None, "on attention", "on experts"])
def test_an_adapter_of_experts_goes_on_training_and_takes_no_other_on_top(lab_of, tmp_path, new):
    """It ended in an error of peft's; one over an older adapter was saved so that nothing could load it."""
    lab = lab_of("qwen3")
    old = EXPERTS | ({"target_modules": ["q_proj"]} if new == "on experts" else {})
    model = get_peft_model(
        load_model(lab.student, dtype="float32"), LoraConfig(**old, task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    if new is not None:
        target = {} if new == "on experts" else {"target_modules": ["q_proj"]}
        with pytest.raises(ConfigError, match="the two cannot be saved as one"):
            trainer_of(lab, tmp_path, str(tmp_path / "adapter"), LoraConfig(**(EXPERTS | target)))
        return
    trainer = trainer_of(lab, tmp_path, str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(trainer.model), logprobs(model), atol=1e-4, rtol=0)
    before = {name: w.clone() for name, w in trainer.model.named_parameters() if "experts" in name}
    trainer.train()
    moved = dict(trainer.model.named_parameters())
    assert all(torch.equal(moved[name], w) != ("lora_" in name) for name, w in before.items())
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_model(tmp_path / "saved", dtype="float32")
    torch.testing.assert_close(logprobs(saved), logprobs(trainer.model), atol=1e-4, rtol=0)
