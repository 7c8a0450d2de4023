"""Ranks in one process: a thread each, whose sums meet at a barrier."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from threading import Barrier

import torch

from taopd.distributed.collectives import Ranks


class World:
    """`size` ranks; counts what their collectives move."""

    def __init__(self, size: int) -> None:
        self.size, self.num_bytes, self.num_calls = size, 0, 0
        self._barrier, self._given = Barrier(size, timeout=30), [None] * size

    def run(self, function, *arguments):
        """`function(ranks, argument)` on every rank at once, the results by rank."""

        def one(rank):
            ranks = Ranks(
                rank=rank, size=self.size, all_reduce=lambda values: self._sum(rank, values)
            )
            try:
                return function(ranks, *(argument[rank] for argument in arguments))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def _sum(self, rank, values):
        self._given[rank] = values
        self._barrier.wait()
        assert len({(each.dtype, each.shape) for each in self._given}) == 1
        total = torch.stack(self._given).sum(0)
        self._barrier.wait()
        if rank == 0:
            self.num_bytes += values.numel() * values.element_size()
            self.num_calls += 1
        return total


def split(table, cuts):
    """Parts of a table between responses: rank i has responses cuts[i - 1] <= r < cuts[i]."""
    borders = [0, *sorted(cuts), 10**6]
    parts = []
    for low, high in pairwise(borders):
        rows = (table.completion >= low) & (table.completion < high)
        columns = {
            name: getattr(table, name)[rows]
            for name in (
                *("disagreement", "compatibility", "entropy"),
                *("completion", "position", "valid"),
            )
        }
        extra = {name: column[rows] for name, column in table.extra.items()}
        parts.append(replace(table, **columns, extra=extra))
    return parts
