"""Drift of a sampler: its log-probs of the sampled tokens against those that are computed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.models.batch import Positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """|log p_sampler - log p_recomputed| of sampled tokens, nats."""

    mean: float
    largest: float
    num_tokens: int


def drift(
    sampling_logprobs: Float[Tensor, "B S"],
    completion_ids: Int[Tensor, "B T"],
    positions: Positions,
    recomputed: Float[Tensor, " N"],
    *,
    merged_ids: Sequence[int] = (),
) -> Drift | None:
    """How far the sampler's log-probs are from the training forward's; None where nothing can be compared.

    Args:
        sampling_logprobs: NaN where the sampler gave none; S <= T.
        recomputed: log p of the sampled tokens at the positions.
        merged_ids: tokens whose recomputed log-prob is that of a class; left out.
    """
    # The sampler's table ends with the longest completion of its own call.
    inside = positions.column < sampling_logprobs.shape[1]
    row, column = positions.row[inside], positions.column[inside]
    tokens = completion_ids[row, column]
    sampled = sampling_logprobs.to(recomputed.device)[row, column]
    known = sampled.isfinite() & ~torch.isin(tokens, tokens.new_tensor(list(merged_ids)))
    if not known.any():
        return None
    # In float64: the difference of two close float32 numbers is the figure itself.
    gap = (sampled - recomputed[inside])[known].double().abs()
    return Drift(mean=float(gap.mean()), largest=float(gap.max()), num_tokens=len(gap))
