"""Several token ids as one: log-probs of a distribution in which they are a single token.

Source: semantic end-of-sequence class, arXiv 2609.20511.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def merge_columns(
    logprobs: Float[Tensor, "N V"], merged_ids: Sequence[int]
) -> Float[Tensor, "N W"]:
    """Log-probs with the merged ids as one last column, log sum p; unchanged without ids."""
    if not merged_ids:
        return logprobs
    inside = torch.tensor(merged_ids, device=logprobs.device)
    others = torch.ones(logprobs.shape[1], dtype=torch.bool, device=logprobs.device)
    others[inside] = False
    merged = logprobs[:, inside].logsumexp(-1, keepdim=True)
    return torch.cat([logprobs[:, others], merged], dim=1)


def merged_token_ids(
    token_ids: Int[Tensor, " N"], merged_ids: Sequence[int], vocab_size: int
) -> Int[Tensor, " N"]:
    """The columns of `merge_columns` in which these ids are found; the ids themselves without a class."""
    if not merged_ids:
        return token_ids
    others = torch.ones(vocab_size, dtype=torch.bool, device=token_ids.device)
    others[torch.tensor(merged_ids, device=token_ids.device)] = False
    place = torch.where(others, others.cumsum(0) - 1, others.sum())
    return place[token_ids]
