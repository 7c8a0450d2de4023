"""How many rows may be kept: counts from a share, over the batch or per response, and over time."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError, suggest
from taopd.signals import SignalTable

SCHEDULES = ("constant", "linear", "cosine")
SCOPES = ("global", "response")
NUM_LENGTHS = 256
"""Lengths that the cost-aware choice tries; with more positions than that, evenly spaced ones."""


def budget_count(budget: float, num_valid: int) -> int:
    """Rows a budget pays for: n = max(1, ceil(budget * N)), a plain double product, at most N.

    Example:
        >>> budget_count(0.07, 100), budget_count(0.55, 100)
        (8, 56)
    """
    if num_valid == 0:
        return 0
    return min(num_valid, max(1, math.ceil(budget * num_valid)))


def response_counts(budget: float, table: SignalTable) -> tuple[Int[Tensor, " N"], int]:
    """Per row, what the budget pays for in its response, by the rule of `budget_count`; and the sum.

    A response without a valid row counts 0. The sum is over all ranks.
    """
    responses, group = table.response.unique(return_inverse=True)
    num_valid = torch.zeros(len(responses), dtype=torch.int64, device=group.device)
    num_valid.index_add_(0, group, table.valid.long())
    counts = torch.tensor([budget_count(budget, n) for n in num_valid.tolist()], dtype=torch.int64)
    counts = counts.to(group.device)
    return counts[group], table.ranks.total(counts.sum())


def scheduled_budget(
    step: int, *, start: float, end: float | None, schedule: str, num_steps: int
) -> float:
    """The budget at a step: from `start` at step 0 to `end` at the last of `num_steps`, then constant.

        linear   start + (end - start) x,    cosine   start + (end - start) (1 - cos(pi x)) / 2

    with x = step / (num_steps - 1) in [0, 1]. Without `end` or with "constant" it is `start`.

    Example:
        >>> scheduled_budget(5, start=0.5, end=0.1, schedule="linear", num_steps=11)
        0.3
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"budget_schedule={schedule!r} is unknown.{suggest(schedule, SCHEDULES)}")
    if schedule == "constant" or end is None:
        return start
    x = min(1.0, step / max(1, num_steps - 1))
    share = x if schedule == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0
    return start + (end - start) * share


def affordable(
    scores: Float[Tensor, " N"],
    candidates: Bool[Tensor, " N"],
    position: Int[Tensor, " N"],
    *,
    num_budget: int,
    cost: float,
) -> Bool[Tensor, " N"]:
    """Candidates up to the last position that is worth its forward.

        maximize over L:  mean of the n best scores at positions <= L  -  cost (L + 1) / (L_max + 1)

    Every row of a batch is computed up to the batch's last kept position, so that position is what a kept
    token costs. Only lengths with n candidates count; ties go to the shorter. Exact over all lengths up to
    `NUM_LENGTHS` of them. Source: none; cost-aware selection is listed as open in the survey of the field.

    Args:
        scores: in [0, 1], so that `cost` is in their unit.
    """
    lengths = position[candidates].unique()
    if lengths.numel() == 0 or cost == 0:
        return candidates
    if lengths.numel() > NUM_LENGTHS:
        place = torch.linspace(0, lengths.numel() - 1, NUM_LENGTHS, device=lengths.device)
        lengths = lengths[place.round().long()]
    num_kept = min(num_budget, int(candidates.sum()))
    best, chosen = -math.inf, int(lengths[-1])
    own, where = scores[candidates], position[candidates]
    for last in lengths.tolist():
        reachable = own[where <= last]
        if reachable.numel() < num_kept:
            continue
        gain = float(reachable.topk(num_kept, sorted=False).values.mean())
        value = gain - cost * (last + 1) / (int(lengths[-1]) + 1)
        if value > best:
            best, chosen = value, last
    return candidates & (position <= chosen)


def within_quota(order: Tensor, quota: Tensor, response: Tensor) -> Tensor:
    """Rows of an order whose place among those of their own response is below the response's quota."""
    return order[place_in_response(order, response) < quota[order]]


def place_in_response(order: Tensor, response: Tensor) -> Tensor:
    """0-based place of each entry of an order among the entries of the same response."""
    _, group = response[order].unique(return_inverse=True)
    by_response = group.argsort(stable=True)
    sizes = torch.bincount(group)
    starts = sizes.cumsum(0) - sizes
    nth = torch.arange(order.shape[0], device=order.device) - starts[group[by_response]]
    return torch.empty_like(nth).index_put_((by_response,), nth)


def top_up(kept: Tensor, preference: Tensor, response: Tensor, min_keep: int) -> None:
    """Add each response's most preferred unkept rows until it has min_keep, or no row left; in
    place."""
    groups, group = response.unique(return_inverse=True)
    num_kept = torch.zeros_like(groups).index_add_(0, group, kept.to(groups.dtype))
    spare = preference[~kept[preference]]
    nth = place_in_response(spare, response)
    most = min(min_keep, response.shape[0])
    kept[spare[nth < most - num_kept[group[spare]]]] = True
