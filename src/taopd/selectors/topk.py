"""The best n rows of all ranks, in the total order of R15, and the score at a place of that order.

One rank that has every row sorts them. Several ranks find the n-th best score, then among the rows equal to
it the n-th position, then among the rows equal in both take the earlier completion: three bounded searches
(`taopd.distributed.collectives`), and each rank marks its own rows. Same rows, bit for bit.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.distributed.collectives import order_statistics
from taopd.signals import SignalTable


def ranking(
    scores: Float[Tensor, " N"],
    rows: Bool[Tensor, " N"],
    table: SignalTable,
    *,
    ascending: bool = False,
) -> Int[Tensor, " M"]:
    """Indices of this rank's M flagged rows, best first, in the total order of R15."""
    index = rows.nonzero()[:, 0]
    if index.shape[0] == 0:
        return index
    position, completion = table.position[index].long(), table.completion[index].long()
    place = position.max() - position if ascending else position
    # One number orders by position, then completion; the stable sort by score keeps it among equal scores.
    ties = place * (completion.max() + 1) + completion
    index = index[ties.argsort(stable=True)]
    return index[scores[index].argsort(descending=not ascending, stable=True)]


def best_rows(
    scores: Float[Tensor, " N"],
    rows: Bool[Tensor, " N"],
    table: SignalTable,
    count: int,
    *,
    ascending: bool = False,
) -> Bool[Tensor, " N"]:
    """This rank's part of the `count` best flagged rows of all ranks; all of them if there are fewer."""
    best = torch.zeros_like(rows)
    if table.ranks.alone:
        best[ranking(scores, rows, table, ascending=ascending)[:count]] = True
        return best
    if count <= 0 or table.ranks.total(rows.sum()) <= count:
        return rows.clone() if count > 0 else best
    # Searches instead of a sort of all rows: what travels does not grow with the number of tokens.
    sign = 1 if ascending else -1
    left = rows.clone()
    for column in (sign * scores, -sign * table.position.long()):
        cut = score_at(column, left, table, count - 1)
        better = left & (column < cut)
        best |= better
        count -= table.ranks.total(better.sum())
        left &= column == cut
    # Ranks hold the completions in their order.
    index = left.nonzero()[:, 0]
    index = index[table.completion[index].argsort(stable=True)]
    mine = max(0, count - table.ranks.before(index.shape[0]))
    best[index[:mine]] = True
    return best


def score_at(
    values: Tensor, rows: Bool[Tensor, " N"], table: SignalTable, place: int
) -> float | int:
    """The value at a 0-based place in the ascending order of all ranks' flagged rows."""
    return order_statistics(values[rows].sort().values, [place], table.ranks)[0]
