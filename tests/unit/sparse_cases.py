"""Micro backbones of several families, one padded batch, and the windowed gradient by definition."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

LENGTH, VOCAB = 23, 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_sliding": (
        "Qwen3",
        {"layer_types": ALTERNATING, "sliding_window": 5, "use_sliding_window": True},
    ),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
    "mistral_sliding": ("Mistral", {"sliding_window": 6}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"layer_types": ALTERNATING, "sliding_window": 5}),
    "gemma3": ("Gemma3Text", {"layer_types": ALTERNATING, "sliding_window": 5}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "smollm3": ("SmolLM3", {}),
    "cohere2": ("Cohere2", {"layer_types": ALTERNATING, "sliding_window": 5}),
}


def make_family(name: str, attention: str = "eager", *, dtype=torch.float32, seed: int = 0):
    """A randomly initialised model of a family, weights large enough that attention matters."""
    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | settings))
    config._attn_implementation = attention
    causal = {"Gemma3Text": "Gemma3ForCausalLM"}.get(prefix, f"{prefix}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, causal)(config).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and wanted positions [4, 23]: padding of 4, 0, 7 and 1 columns on the left; the
    third row wants nothing."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (4, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((4, 0, 7, 1)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, columns in enumerate(((9, 10, 17), (3, 21), (), (12,))):
        wanted[row, list(columns)] = True
    return ids, mask, wanted


def active_by_definition(wanted: Tensor, mask: Tensor, window: int) -> Tensor:
    """Wanted positions and the `window` before each, one at a time."""
    active = wanted.clone()
    for row, column in wanted.nonzero().tolist():
        for before in range(max(0, column - window), column):
            active[row, before] |= bool(mask[row, before])
    return active


@contextmanager
def _detached_elsewhere(backbone: Any, active: Tensor) -> Iterator[None]:
    """Detach, in every layer, the input and the keys and values of positions that are not active."""

    def cut(states: Tensor) -> Tensor:
        rest = [1] * (states.ndim - 2)
        if states.shape[1] == LENGTH:
            keep = active.view(*active.shape, *rest)
        else:  # [b, heads, L, d]
            keep = active.view(active.shape[0], 1, LENGTH, *rest[1:])
        return torch.where(keep, states, states.detach())

    handles = []
    for layer in backbone.layers:
        handles.append(layer.register_forward_pre_hook(lambda _, args: (cut(args[0]), *args[1:])))
        for name in ("k_proj", "v_proj", "qkv_proj", "k_norm"):
            module = getattr(layer.self_attn, name, None)
            if module is not None:
                handles.append(module.register_forward_hook(lambda _, args, out: cut(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def windowed_by_definition(backbone: Any, ids, mask, active: Tensor) -> Tensor:
    """Last hidden states [b, L, D] of a full forward whose graph holds active positions only."""
    with _detached_elsewhere(backbone, active):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
