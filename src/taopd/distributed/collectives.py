"""Collectives over ranks: counts, sums and exact order statistics of rows that are spread over them.

Each rank holds some of the rows. A backend only has to provide `Ranks.all_reduce`, the sum of a small tensor
over ranks. Counts, sums and exact order statistics (quantiles, medians, the n-th largest) are made from it;
no row leaves its rank.

Why not gather: the scores of all tokens on every rank are bytes in proportion to tokens times ranks. Here an
order statistic costs `BYTES_PER_PLACE`, however many rows there are.

How: a radix search. A float64 is mapped to an int64 of the same order. Its 256 possible first bytes divide
the numbers into as many bins; every rank counts its values below each border, the sum gives the bin of the
wanted order, and the next byte is searched within it. After eight bytes the number is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.distributed.radix import BITS

DRAWS_AT_ONCE = 2**20
"""Random numbers of other ranks that are drawn and dropped at a time."""


def _unchanged(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the ranks; the default is a single process.

    Every method but the properties is a collective: all ranks call it, each with its values.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _unchanged
    """Sum over ranks of an int64 or float64 tensor; the same result on every rank."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    def total(self, count: int | Tensor) -> int:
        """Sum of a whole number over ranks."""
        return int(self.all_reduce(torch.tensor([int(count)], dtype=torch.int64)))

    def any(self, flags: Tensor) -> bool:
        """Whether any entry is true on any rank."""
        return self.total(bool(flags.any())) > 0

    def sums(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Sums over ranks of every entry, in float64."""
        device = values.device
        return values if self.alone else self.all_reduce(values.double().cpu()).to(device)

    def counts(self, count: int) -> list[int]:
        """A list of this number on every rank."""
        local = torch.zeros(self.size, dtype=torch.int64)
        local[self.rank] = count
        return self.all_reduce(local).tolist()

    def before(self, count: int) -> int:
        """Sum of this number over the ranks before this one."""
        return sum(self.counts(count)[: self.rank])


ALONE = Ranks()


def order_statistics(
    ascending: Float[Tensor, " M"] | Int[Tensor, " M"], places: Sequence[int], ranks: Ranks = ALONE
) -> list[float] | list[int]:
    """Exact order statistics: the values at 0-based places in the ascending order over all ranks.

    Sends `BYTES_PER_PLACE` per place and rank.

    Args:
        ascending: this rank's values, sorted, without NaN; may be empty. float64 or int64.
        places: below the number of values on all ranks.

    Example:
        >>> order_statistics(torch.tensor([1.0, 2.0, 5.0]), [0, 2])
        [1.0, 5.0]
    """
    if ranks.alone:
        return [ascending[place].item() for place in places]
    keys, wanted = _sortable(ascending.cpu()), torch.tensor(places)[:, None]
    found = torch.zeros(len(places), 1, dtype=torch.int64)
    parts = torch.arange(2**BITS)
    for shift in range(64 - BITS, -1, -BITS):
        # The first byte holds the sign.
        digits = parts - 2 ** (BITS - 1) if shift == 64 - BITS else parts
        last = found + (digits << shift) + ((1 << shift) - 1)
        below = ranks.all_reduce(torch.searchsorted(keys, last, right=True))
        part = (below <= wanted).sum(1, keepdim=True)
        found += digits[part] << shift
    return _values(found[:, 0], ascending.dtype).tolist()


def quantiles(
    ascending: Float[Tensor, " M"],
    shares: Sequence[float],
    *,
    snap: bool = True,
    ranks: Ranks = ALONE,
) -> list[float] | None:
    """Quantiles of all ranks' values by linear interpolation at place q (M - 1); None without a value.

    Args:
        ascending: this rank's values, sorted, float64 without NaN; may be empty.
        snap: return the value itself between two equal ones, where the weighted sum may be off in the last
            bit (which the released code keeps).
    """
    last = ranks.total(ascending.shape[0]) - 1
    if last < 0:
        return None
    exact = [share * last for share in shares]
    lower = [math.floor(place) for place in exact]
    places = [place for low in lower for place in (low, min(low + 1, last))]
    values = order_statistics(ascending, places, ranks)
    found = []
    for place, low, left, right in zip(exact, lower, values[::2], values[1::2], strict=True):
        weight = place - low
        found.append(left if snap and left == right else left * (1 - weight) + right * weight)
    return found


def uniform_part(
    num_rows: int, generator: torch.Generator, ranks: Ranks, dtype: torch.dtype = torch.float64
) -> Float[Tensor, " N"]:
    """This rank's rows of one `torch.rand` draw over the rows of all ranks.

    Numbers are drawn one after the other, so those of the other ranks are drawn and dropped.
    """
    counts = ranks.counts(num_rows)
    local = torch.empty(0, dtype=dtype)
    for rank, count in enumerate(counts):
        if rank == ranks.rank:
            local = torch.rand(count, generator=generator, dtype=dtype)
            continue
        for start in range(0, count, DRAWS_AT_ONCE):
            torch.rand(min(DRAWS_AT_ONCE, count - start), generator=generator, dtype=dtype)
    return local


def _sortable(values: Tensor) -> Int[Tensor, " M"]:
    """int64 in the order of the values; -0.0 and 0.0 are one."""
    if not values.is_floating_point():
        return values.long()
    bits = (values.double() + 0.0).view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _values(keys: Int[Tensor, " q"], dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return keys
    bits = torch.where(keys < 0, keys ^ torch.iinfo(torch.int64).max, keys)
    return bits.view(torch.float64)
