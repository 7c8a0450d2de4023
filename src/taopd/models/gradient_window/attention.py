"""Attention of the active positions over a constant prefix in which their own keys and values are fresh.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j    over the positions j <= i that i may see,

where k_j, v_j are fresh (with gradient) if j is active and constants of the no-grad pass if not. The backward
gives gradients to the queries and to the fresh keys and values only: two of its four matmuls are as narrow
as the active positions are few. Saved for it are the fresh tensors and nothing of the prefix's length;
scores are computed again, block by block.

Why not sdpa with a mask: it saves keys and values of the whole length per layer (repeated for grouped
heads), computes their gradients to throw them away, and has no soft cap. What this does not do: attention
dropout, sinks, position biases (errors, not approximations).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from taopd.errors import ConfigError
from taopd.models.gradient_window.positions import Block, Layout

IMPLEMENTATION = "taopd_gradient_window"
"""Name under which transformers calls `window_attention_forward`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowState:
    """What every attention layer of one sparse forward reads."""

    layout: Layout
    keys: tuple[Float[Tensor, "b Hkv L d"], ...]
    values: tuple[Float[Tensor, "b Hkv L dv"], ...]
    called: list[str] = field(default_factory=list)
    """Classes of the layers that came by."""


# A context variable, not an argument: transformers decides what an attention layer is called with.
_STATE: ContextVar[WindowState | None] = ContextVar("taopd_window_state", default=None)


@contextmanager
def window_state(state: WindowState) -> Iterator[None]:
    """Make `state` the one that attention layers read, in this thread."""
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)


def _grouped(packed: Tensor, block: Block, num_groups: int) -> Tensor:
    """Queries of a block [H, M, d] -> [Hkv, group * q, d]: heads that share keys become more queries."""
    # Repeating keys and values for grouped heads would cost memory; reshaping the queries costs none.
    part = packed[:, block.queries]
    return part.reshape(num_groups, -1, part.shape[-1])


def _ungrouped(values: Tensor, num_heads: int) -> Tensor:
    return values.reshape(num_heads, -1, values.shape[-1])


def _probabilities(
    scaled_query: Tensor, keys: Tensor, block: Block, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [Hkv, group * q, k] of a block, and tanh(score / softcap) if there is a cap.

    The softmax is in float32 (float64 for float64), the result in the dtype of the keys.
    """
    scores = torch.bmm(scaled_query, keys[:, block.keys].transpose(1, 2))
    capped = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    num_queries, num_keys = block.unseen.shape
    # In place: scores of a block are the largest tensor here.
    scores.view(-1, num_queries, num_keys).masked_fill_(block.unseen, -torch.inf)
    if scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, -1), capped
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype), capped


class _WindowAttention(torch.autograd.Function):
    """Packed queries, fresh keys and fresh values [heads, M, d], and one layer's prefix."""

    @staticmethod
    def forward(
        ctx, query, key, value, constant_keys, constant_values, layout, scale, softcap, sliding
    ):
        num_heads, num_groups = query.shape[0], key.shape[0]
        out = value.new_empty(num_heads, query.shape[1], value.shape[-1])
        for sequence, blocks in layout.blocks(sliding, num_heads):
            keys = sequence.gather(constant_keys, key)
            values = sequence.gather(constant_values, value)
            for block in blocks:
                scaled = _grouped(query, block, num_groups) * scale
                weights, _ = _probabilities(scaled, keys, block, softcap)
                mixed = torch.bmm(weights, values[:, block.keys])
                out[:, block.queries] = _ungrouped(mixed, num_heads)
        ctx.save_for_backward(query, key, value)
        # Constants of the graph: autograd has nothing to track in them.
        ctx.rest = constant_keys, constant_values, layout, scale, softcap, sliding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value = ctx.saved_tensors
        constant_keys, constant_values, layout, scale, softcap, sliding = ctx.rest
        num_heads, num_groups = query.shape[0], key.shape[0]
        # Blocks overlap in their fresh keys: sums of many small terms, which bf16 would round away.
        accumulate = torch.float64 if key.dtype == torch.float64 else torch.float32
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=accumulate)
        grad_value = torch.zeros_like(value, dtype=accumulate)
        for sequence, blocks in layout.blocks(sliding, num_heads):
            keys = sequence.gather(constant_keys, key)
            values = sequence.gather(constant_values, value)
            for block in blocks:
                scaled = _grouped(query, block, num_groups) * scale
                grad_mixed = _grouped(grad_out, block, num_groups)
                weights, capped = _probabilities(scaled, keys, block, softcap)
                # Constant keys and values get no gradient: their columns leave before the matmul.
                fresh_weights = weights.index_select(2, block.fresh_keys)
                grad_value[:, block.fresh] += torch.bmm(fresh_weights.transpose(1, 2), grad_mixed)
                grad_weights = torch.bmm(grad_mixed, values[:, block.keys].transpose(1, 2))
                # Autograd's own fused kernel: written out, it holds three tensors as large as the scores.
                grad_scores = torch.ops.aten._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype
                )
                if capped is not None:
                    grad_scores = grad_scores * (1 - capped * capped)
                grad_block = torch.bmm(grad_scores, keys[:, block.keys]) * scale
                grad_query[:, block.queries] = _ungrouped(grad_block, num_heads)
                fresh_scores = grad_scores.index_select(2, block.fresh_keys)
                grad_key[:, block.fresh] += torch.bmm(fresh_scores.transpose(1, 2), scaled)
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            *(None for _ in ctx.rest),
        )


# Tensors that layers pass on but whose effect is in the rotated queries and keys already.
_READ_ELSEWHERE = {"position_ids", "cache_position"}


def window_attention_forward(
    module: Any,
    query: Float[Tensor, "1 H M d"],
    key: Float[Tensor, "1 Hkv M d"],
    value: Float[Tensor, "1 Hkv M dv"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 M H dv"], None]:
    """What a transformers attention layer calls in place of sdpa or eager during a sparse forward.

    Args:
        sliding_window: a position sees itself and the `sliding_window - 1` columns before it.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).

    Raises:
        ConfigError: for attention that this file does not compute.
    """
    state = _STATE.get()
    assert state is not None, f"{IMPLEMENTATION} outside a sparse forward"
    layer = type(module).__name__
    state.called.append(layer)
    if attention_mask is not None or others.get("is_causal") is False:
        raise ConfigError(
            f"gradient_window: {layer} has a mask of its own; only causal and sliding-window layers are "
            "supported: set gradient_window to none"
        )
    if dropout > 0.0:
        raise ConfigError(
            f"gradient_window: {layer} drops attention weights (p={dropout}): set its dropout "
            "(attention_dropout, attn_pdrop) to 0 in the student's config, or gradient_window to none"
        )
    # A bias or a sink that we do not know would be left out without a word.
    for name, argument in others.items():
        if isinstance(argument, Tensor) and name not in _READ_ELSEWHERE:
            raise ConfigError(
                f"gradient_window: {layer} adds {name!r} to its attention, which is not supported: set "
                "gradient_window to none"
            )
    index = module.layer_idx
    constant = state.keys[index], state.values[index]
    if (constant[0].shape[1], constant[0].shape[3]) != (key.shape[1], key.shape[3]):
        raise ConfigError(
            f"gradient_window: {layer} attends to other keys than it hands to a cache, which is not "
            "supported: set gradient_window to none"
        )
    # The batch dimension is 1: all sequences lie packed in one row.
    fresh = query[0], key[0], value[0]
    # Under autocast sdpa would cast its inputs; a custom function has to do so itself, once.
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        fresh = fresh[0].to(dtype), fresh[1].to(dtype), fresh[2].to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        out = _WindowAttention.apply(
            *fresh, *constant, state.layout, scale, softcap, sliding_window
        )
    return out.transpose(0, 1).contiguous()[None], None


AttentionInterface.register(IMPLEMENTATION, window_attention_forward)
