"""Scale, soft cap and rows of every family's head. Oracle: transformers' own logits, and its source text."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from taopd.models.forward import backbone_forward
from taopd.models.output_head import _DIVISORS, _MULTIPLIERS, _SOFTCAPS, head_rows
from taopd.models.own_forward import compare_with_own_forward
from tests.unit.test_own_forward import BATCH, SIZES

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Beside the number whose effect is measured: what a micro model of the family needs.
FAMILIES = {
    "divided, Inkling": ("InklingText", {"logits_mup_width_multiplier": 6.0}),
    "divided, Granite": ("GraniteMoe", {"logits_scaling": 4.0} | LOCAL),
    "divided by what is computed": ("MiniCPM3", {"dim_model_base": 4}),
    "multiplied, HyperCLOVA X": ("HyperCLOVAX", {"logits_scaling": 0.3}),
    "multiplied, Cohere": ("Cohere2", {"logit_scale": 0.3}),
    "multiplied, Falcon H1": ("FalconH1", {"lm_head_multiplier": 0.3}),
    "capped, Gemma 3": ("Gemma3Text", {"final_logit_softcapping": 3.0}),
    "capped, nanochat": ("NanoChat", {"final_logit_softcapping": 3.0}),
    "capped and cut": ("Inkling2Text", {"final_logit_softcapping": 3.0, "unpadded_vocab_size": 30}),
    "cut": ("InklingText", {"unpadded_vocab_size": 30}),
    "a bias": ("Phimoe", {"lm_head_bias": True} | LOCAL),
    "named and not applied": ("Mpt", {"logit_scale": 0.3}),
    "a word and not applied": ("Mpt", {"logit_scale": "inv_sqrt_d_model"}),
}
LOW_RANK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MORE = {
    "InklingText": EXPERTS
    | {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 8}
    | {"d_rel": 4, "rel_extent": 16, "n_shared_experts": 1},
    "Inkling2Text": EXPERTS | {"unpadded_vocab_size": 40},
    "MiniCPM3": LOW_RANK | {"v_head_dim": 4, "head_dim": 4, "num_key_value_heads": 2},
    "FalconH1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}
    | {"mamba_n_groups": 1, "mamba_chunk_size": 8},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 1},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_read_as_its_forward_applies_it(name):
    kind, options = FAMILIES[name]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(3)
    sizes = SIZES | MORE.get(kind, {}) | TOKENS | options
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    rows = head_rows(model.config)
    assert rows == options.get("unpadded_vocab_size", 40)
    found = compare_with_own_forward(backbone_forward(rows), model, model, BATCH, rows)
    assert found.error < 1e-4 and found.tokens == 6


READ = {*_SOFTCAPS, *_MULTIPLIERS, *_DIVISORS, "logit_softcap", "unpadded_vocab_size"}
"""What is read, by the names that forwards use."""
AROUND = {
    *("config", "model", "lm_head", "last_hidden_state", "float", "functional", "tanh"),
    "shape",  # of labels
}


def test_no_forward_applies_a_number_that_the_head_does_not_know():
    """A new family is found here, and not by its first user."""
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    classes = {name for names in listed for name in ([names] if isinstance(names, str) else names)}
    seen, unknown = set(), {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if not any(f"class {name}(" in text for name in classes):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name in classes:
                seen.add(node.name)
                if names := _applied(node) - READ - AROUND:
                    unknown[node.name] = names
    assert len(seen) > 100 and unknown == {}, str(unknown)


def _applied(model):
    """Names in the arithmetic of a forward with states and logits, and of what it calls on logits."""
    (forward,) = [
        part for part in model.body if isinstance(part, ast.FunctionDef) and part.name == "forward"
    ]
    found = set()
    for step in ast.walk(forward):
        if not isinstance(step, ast.Assign):
            continue
        if not _is_logits(step.targets[0]) and ast.unparse(step.targets[0]) != "hidden_states":
            continue
        for node in ast.walk(step.value):
            used = []
            if isinstance(node, ast.BinOp | ast.Slice):
                used = list(ast.walk(node))
            elif isinstance(node, ast.Call) and any(map(_is_logits, node.args)):
                used = [node.func, *node.args]
            found |= {each.attr for each in used if isinstance(each, ast.Attribute)}
    return found


def _is_logits(node):
    return ast.unparse(node) in ("logits", "lm_logits")
