"""How many rows may be kept: counts from a share, over the batch or per completion, and over time."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from taopd.errors import ConfigError, require_known
from taopd.signals import TEACHER, SignalTable

SCHEDULES = ("constant", "linear", "cosine")
SCOPES = ("global", "response", "teacher")


def budget_count(budget: float, num_valid: int) -> int:
    """Rows a budget pays for: n = max(1, ceil(budget * N)), a plain double product, at most N.

    Example:
        >>> budget_count(0.07, 100), budget_count(0.55, 100)
        (8, 56)
    """
    if num_valid == 0:
        return 0
    # Not corrected for rounding, so that counts equal the released code's.
    return min(num_valid, max(1, math.ceil(budget * num_valid)))


def completion_counts(budget: float, table: SignalTable) -> tuple[Int[Tensor, " N"], int]:
    """Per row, what the budget pays for in its completion, by the rule of `budget_count`; and the sum.

    A completion without a valid row counts 0. The sum is over all ranks.
    """
    completions, group = table.completion.unique(return_inverse=True)
    num_valid = torch.zeros(len(completions), dtype=torch.int64, device=group.device)
    num_valid.index_add_(0, group, table.valid.long())
    # In Python's doubles: a float32 product on the device would round to other counts.
    counts = torch.tensor([budget_count(budget, n) for n in num_valid.tolist()], dtype=torch.int64)
    counts = counts.to(group.device)
    return counts[group], table.ranks.total(counts.sum())


def teacher_of_rows(table: SignalTable, asked: str) -> Int[Tensor, " N"]:
    """The index of each row's teacher.

    Args:
        asked: the setting that reads it, for the message.

    Raises:
        ConfigError: the table does not say which teacher a row has.
    """
    if TEACHER not in table.extra:
        raise ConfigError(
            f"{asked} reads the column {TEACHER!r}, which this table does not hold: several teachers "
            "of a trainer put it there"
        )
    return table.extra[TEACHER].long()


def teacher_counts(budget: float, table: SignalTable) -> list[int]:
    """Per teacher, what the budget pays for in its completions on all ranks, by the rule of `budget_count`.

    Raises:
        ConfigError: the table does not say which teacher a row has.
    """
    teacher = teacher_of_rows(table, "scope='teacher'")
    # The same number on every rank, also where one has no row of the last teacher.
    num_teachers = max(table.ranks.counts(int(teacher.max()) + 1 if len(teacher) else 0))
    num_valid = torch.bincount(teacher[table.valid], minlength=num_teachers)
    totals = table.ranks.sums(num_valid.double()).tolist()
    return [budget_count(budget, int(total)) for total in totals]


def scheduled_budget(
    step: int, *, start: float, end: float | None, schedule: str, num_steps: int
) -> float:
    """The budget at a step: from `start` at step 0 to `end` at the last of `num_steps`, then constant.

        linear   start + (end - start) x,    cosine   start + (end - start) (1 - cos(pi x)) / 2

    with x = step / (num_steps - 1) in [0, 1]. Without `end` or with "constant" it is `start`.

    Example:
        >>> scheduled_budget(5, start=0.5, end=0.1, schedule="linear", num_steps=11)
        0.3

    Raises:
        ConfigError: for an unknown schedule.
    """
    require_known("budget_schedule", schedule, SCHEDULES)
    if schedule == "constant" or end is None:
        return start
    # A schedule of one step has no range to divide by; steps after the last stay at its end.
    x = min(1.0, step / max(1, num_steps - 1))
    share = x if schedule == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0
    return start + (end - start) * share


def within_quota(order: Tensor, quota: Tensor, completion: Tensor) -> Tensor:
    """Rows of an order whose place among those of their own completion is below the completion's quota."""
    return order[place_in_completion(order, completion) < quota[order]]


def place_in_completion(order: Tensor, completion: Tensor) -> Tensor:
    """0-based place of each entry of an order among the entries of the same completion."""
    _, group = completion[order].unique(return_inverse=True)
    # The stable sort puts a completion's entries side by side and leaves their order as it is.
    by_response = group.argsort(stable=True)
    sizes = torch.bincount(group)
    starts = sizes.cumsum(0) - sizes
    nth = torch.arange(order.shape[0], device=order.device) - starts[group[by_response]]
    return torch.empty_like(nth).index_put_((by_response,), nth)


def top_up(kept: Tensor, preference: Tensor, completion: Tensor, min_keep: int) -> None:
    """Add each completion's most preferred unkept rows until it has min_keep, or no row left; in
    place."""
    groups, group = completion.unique(return_inverse=True)
    num_kept = torch.zeros_like(groups).index_add_(0, group, kept.to(groups.dtype))
    # All completions at once: a loop over them would wait for the device in each.
    spare = preference[~kept[preference]]
    nth = place_in_completion(spare, completion)
    most = min(min_keep, completion.shape[0])
    kept[spare[nth < most - num_kept[group[spare]]]] = True
