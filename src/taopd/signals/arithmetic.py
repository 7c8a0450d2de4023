"""How the top-K list metrics are evaluated: fast on any device, or bit for bit as the released
code.

What: `TORCH` uses torch's kernels and sums the union of two lists as (student's ids, then the
teacher's others). `LIBM` uses the C library through `math` and sums the union in the order of a
CPython set of the ids, which is what the released code does.

Why two: the values agree to about 1e-15, but scores saturate. TIP is `h + d - h d`; where h = 1 it
comes out as 1 or as 1 - 2**-53 depending on the last bit of d, and the released code breaks "ties"
among such rows by that bit. Reproducing its masks on every file therefore takes its last bits too.
Training needs none of this, so `LIBM`, which visits one number at a time, serves
`taopd.diagnose.conformance.check` only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Elementary functions on float64 tensors, and the order in which a union of ids is summed."""

    exp: Callable[[Tensor], Tensor]
    log: Callable[[Tensor], Tensor]
    sqrt: Callable[[Tensor], Tensor]
    union_order: Callable[[Tensor, Tensor], Tensor] | None = None
    """(ids [U, N], is a member [U, N]) -> the row index to sum at each step [U, N]; None: as
    stored."""


def _one_by_one(function: Callable[[float], float]) -> Callable[[Tensor], Tensor]:
    def apply(values: Tensor) -> Tensor:
        results = [function(value) for value in values.flatten().tolist()]
        return torch.tensor(results, dtype=torch.float64).reshape(values.shape)

    return apply


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log(value: float) -> float:
    return math.log(value) if value > 0 else (-math.inf if value == 0 else math.nan)


def _sqrt(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan


def set_order(ids: Int[Tensor, "U N"], member: Bool[Tensor, "U N"]) -> Int[Tensor, "U N"]:
    """Index that puts each column's members in the iteration order of a CPython set, others
    last."""
    columns = []
    for tokens, present in zip(ids.T.tolist(), member.T.tolist(), strict=True):
        place = {token: row for row, token in enumerate(tokens) if present[row]}
        absent = [row for row, here in enumerate(present) if not here]
        # a set made from a list, not from the dict: how it grew decides the iteration order
        history = list(place)
        columns.append([place[token] for token in set(history)] + absent)
    return torch.tensor(columns, dtype=torch.int64).reshape(ids.shape[1], ids.shape[0]).T


TORCH = Arithmetic(exp=torch.exp, log=torch.log, sqrt=torch.sqrt)
LIBM = Arithmetic(
    exp=_one_by_one(_exp), log=_one_by_one(_log), sqrt=_one_by_one(_sqrt), union_order=set_order
)
