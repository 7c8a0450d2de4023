"""Sums and recurrences along each response of a table, whatever the order of its rows.

All responses advance together, one step per position, so a recurrence costs the longest response and not
the number of tokens. Rows that may not train count as absent.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.signals import SignalTable


def in_order(table: SignalTable) -> Int[Tensor, " N"]:
    """Index that puts the rows in the order (response, position)."""
    if len(table) == 0:
        return table.response.new_zeros(0)
    width = table.position.max() + 1
    return (table.response.long() * width + table.position).argsort(stable=True)


def earlier_sum(values: Float[Tensor, " N"], table: SignalTable) -> Float[Tensor, " N"]:
    """Sum of `values` over the valid rows of the same response that come before each row."""
    order = in_order(table)
    counted = torch.where(table.valid, values, 0.0)[order]
    before = counted.cumsum(0) - counted
    starts = _starts(table.response[order])
    # The running sum of the whole table, less what it was where the response began.
    return torch.empty_like(values).index_put_((order,), before - before[starts])


def response_sum(values: Float[Tensor, " N"], table: SignalTable) -> Float[Tensor, " N"]:
    """Sum of `values` over the valid rows of each row's response."""
    _, group = table.response.unique(return_inverse=True)
    counted = torch.where(table.valid, values, 0.0)
    num_groups = int(group.max()) + 1 if group.numel() else 0
    return counted.new_zeros(num_groups).index_add_(0, group, counted)[group]


def discounted_future(
    values: Float[Tensor, " N"], decay: Float[Tensor, " N"], table: SignalTable
) -> Float[Tensor, " N"]:
    """R_t = values_t + decay_t R_(t+1) along each response, R = 0 after its last row.

    A row that may not train adds nothing itself and hands on what comes after it.
    """
    order = in_order(table)
    own = torch.where(table.valid, values, 0.0)[order]
    carry = torch.where(table.valid, decay, torch.ones_like(decay))[order]
    _, lengths = torch.unique_consecutive(table.response[order], return_counts=True)
    starts = lengths.cumsum(0) - lengths
    result = own.clone()
    for step in range(int(lengths.max()) - 2 if lengths.numel() else -1, -1, -1):
        rows = starts[lengths > step + 1] + step
        result[rows] = own[rows] + carry[rows] * result[rows + 1]
    return torch.empty_like(values).index_put_((order,), result)


def relative_position(table: SignalTable) -> Float[Tensor, " N"]:
    """Place in the response, 0 at its first position and 1 at its last."""
    if len(table) == 0:
        return table.disagreement.new_zeros(0)
    _, group = table.response.unique(return_inverse=True)
    last = torch.zeros(int(group.max()) + 1, dtype=table.position.dtype, device=group.device)
    last.scatter_reduce_(0, group, table.position, "amax")
    return table.position.double() / last[group].clamp_min(1)


def _starts(ordered_response: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    _, inverse, counts = torch.unique_consecutive(
        ordered_response, return_inverse=True, return_counts=True
    )
    return (counts.cumsum(0) - counts)[inverse]
