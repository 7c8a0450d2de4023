"""What is known about every completion position: one row per position, no model, no device choice.

`TokenSignals` is what scoring produces on one rank, top-K lists included. `SignalTable` is the narrow part
of it that a selector may read, with the bookkeeping a global choice needs (which completion, where in it,
may it train); it is what travels between ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks
from taopd.errors import ConfigError, ShapeError, suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSignals:
    """Signals of N completion positions. Log-probs, entropies and divergences are in nats.

    A field that a source of signals cannot give is None (two top-K lists do not hold a full-vocabulary
    divergence); it is never a guess.
    """

    disagreement: Float[Tensor, " N"]
    """D = KL(teacher || student) on the union of both supports, both renormalized there. [eq. 3, 9]"""
    compatibility: Float[Tensor, " N"]
    """C in [0, 1], teacher mass on the student's top-K; a lower bound from lists. [eq. 4, 17]"""
    entropy: Float[Tensor, " N"]
    """H of the student, full vocabulary; from lists: of the renormalized list, divided by ln(n)."""
    teacher_entropy: Float[Tensor, " N"] | None
    reverse_disagreement: Float[Tensor, " N"]
    """KL(student || teacher) on the union of supports."""
    bhattacharyya: Float[Tensor, " N"]
    """Sum over the union of sqrt(p_S p_T), both renormalized there; in [0, 1]."""
    overlap: Float[Tensor, " N"]
    """|S_S intersect S_T| / K; in [0, 1]."""
    jaccard: Float[Tensor, " N"]
    """|S_S intersect S_T| / |S_S union S_T|; in [0, 1]."""
    compatibility_is_exact: bool
    """False where `compatibility` is the lower bound from the teacher's own top-K."""
    student_topk_ids: Int[Tensor, "N K"]
    """Best first; -1 where a list is shorter than K."""
    student_topk_logprobs: Float[Tensor, "N K"]
    """Best first; -inf where a list is shorter than K."""
    teacher_topk_ids: Int[Tensor, "N K"]
    teacher_topk_logprobs: Float[Tensor, "N K"]
    student_logprobs: Float[Tensor, " N"] | None = None
    """log p_S of the sampled token."""
    teacher_logprobs: Float[Tensor, " N"] | None = None
    """log p_T of the sampled token."""
    forward_kl: Float[Tensor, " N"] | None = None
    """KL(teacher || student), full vocabulary."""
    reverse_kl: Float[Tensor, " N"] | None = None
    """KL(student || teacher), full vocabulary."""
    compatibility_bound: Float[Tensor, " N"] | None = None
    """The lower bound, teacher mass on the ids that both lists hold, whatever `compatibility` is. [eq. 17]"""
    token_ids: Int[Tensor, " N"] | None = None
    """The sampled tokens y."""
    student_at_teacher_ids: Float[Tensor, "N K"] | None = None
    """log p_S of `teacher_topk_ids`; two lists alone do not hold it."""
    teacher_at_student_ids: Float[Tensor, "N K"] | None = None
    """log p_T of `student_topk_ids`; a server gives it only if asked for these ids."""
    reach: Float[Tensor, " N"] | None = None
    """r in [0, 1], see `signals.reach`; the trainer adds it, which alone has the initial student. A lower
    bound where the teacher is behind a server."""
    foreign: Float[Tensor, " N"] | None = None
    """f in [0, 1]: the teacher's mass on ends at which the sampler goes on, added with `reach`; None: there
    are no such ends."""
    initial_logprobs: Float[Tensor, " N"] | None = None
    """log p_S0 of the sampled token, S0 the initial student; added with `reach`."""
    initial_disagreement: Float[Tensor, " N"] | None = None
    """D of the initial student with the teacher; the trainer adds it, where a selector reads it."""
    initial_compatibility: Float[Tensor, " N"] | None = None
    """C of the initial student with the teacher, likewise."""
    full_entropy: Float[Tensor, " N"] | None = None
    """H of the student over the full vocabulary, nats, where `entropy` is that of a list and it is known."""

    def __len__(self) -> int:
        return self.disagreement.shape[0]


Columns = TypeVar("Columns")
"""A dataclass of tensors with one row for each position."""


def taken(columns: Columns, rows: Tensor) -> Columns:
    """The columns at some positions: indices or a mask."""
    return replace(  # type: ignore[type-var]
        columns,
        **{
            column.name: value[rows]
            for column in fields(columns)  # type: ignore[arg-type]
            if isinstance(value := getattr(columns, column.name), Tensor)
        },
    )


def concatenate(blocks: Sequence[Columns]) -> Columns:
    """One dataclass of columns from those of consecutive positions (at least one block).

    A column that a block lacks (None) is None; a flag holds if it holds in every block.
    """
    joined: dict[str, Any] = {}
    for name in (column.name for column in fields(blocks[0])):  # type: ignore[arg-type]
        parts = [getattr(block, name) for block in blocks]
        if isinstance(parts[0], bool):
            joined[name] = all(parts)
        else:
            joined[name] = None if any(part is None for part in parts) else torch.cat(parts)
    return type(blocks[0])(**joined)


FOREIGN, INITIAL, TEACHER = "foreign", "initial_logprobs", "teacher"
"""Further columns of a table: the fields of `TokenSignals`; which of several teachers a row has, from 0."""
COMPATIBILITIES = ("mass", "bound", "set", "bc", "jaccard", "prefix_ema", "reach")
"""Proxies for C; see `compatibility_proxy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalTable:
    """What a selector reads: N positions in the order (completion, position). float64, one device.

    Aligned example, two completions of three and two tokens, the last one masked out:

        completion     0    0    0    1    1
        position       0    1    2    0    1
        valid          T    T    T    T    F
        disagreement  .02  1.3   .4   .0   .7
    """

    disagreement: Float[Tensor, " N"]
    compatibility: Float[Tensor, " N"]
    """Already the chosen proxy."""
    entropy: Float[Tensor, " N"]
    completion: Int[Tensor, " N"]
    """Index of the completion in the whole generation batch, ascending."""
    position: Int[Tensor, " N"]
    """0-based position inside the completion."""
    valid: Bool[Tensor, " N"]
    """May train. Rows that may not are kept because the released code lets them set the scale (R8)."""
    extra: dict[str, Float[Tensor, " N"]] = field(default_factory=dict)
    """Further named signals; see `signals.derived`."""
    ranks: Ranks = ALONE
    """Who holds the other rows, if this is one rank's part of a table: whole completions, by rank."""

    def __post_init__(self) -> None:
        shape = tuple(self.disagreement.shape)
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise ShapeError(
                    f"SignalTable.{column.name}: expected shape {list(shape)}, got {list(value.shape)}; "
                    "every column has one entry per completion position"
                )

    def __len__(self) -> int:
        return self.disagreement.shape[0]


def prefix_ema(
    compatibility: Float[Tensor, " N"], completion: Int[Tensor, " N"], *, decay: float = 0.9
) -> Float[Tensor, " N"]:
    """Moving average of C along each completion: e_0 = C_0, e_t = decay e_{t-1} + (1 - decay) C_t.

    Rows are in the order (completion, position). Masked rows take part (R7). All completions advance
    together, one step per position, so the cost is the longest completion, not the number of tokens.
    """
    num_rows = compatibility.shape[0]
    if num_rows == 0:
        return compatibility.clone()
    _, lengths = torch.unique_consecutive(completion, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    averages = compatibility.clone()
    previous = compatibility[starts]
    for step in range(1, int(lengths.max())):
        alive = lengths > step
        rows = starts[alive] + step
        previous = torch.where(alive, previous, torch.zeros_like(previous))
        current = decay * previous[alive] + (1.0 - decay) * compatibility[rows]
        averages[rows] = current
        previous[alive] = current
    return averages


def compatibility_proxy(
    signals: TokenSignals, name: str, completion: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The chosen stand-in for C. [docs/math.md]

    mass: teacher mass on S_S; bound: on the ids in both lists (eq. 17); set: |S_S and S_T| / K; bc:
    Bhattacharyya; jaccard; prefix_ema: moving average of mass along the completion; reach: teacher mass on
    what the initial student could have said.

    Raises:
        ConfigError: for an unknown name, or reach where no initial student was asked.
    """
    if name == "prefix_ema":
        return prefix_ema(signals.compatibility, completion)
    proxies = {
        "mass": signals.compatibility,
        "bound": signals.compatibility_bound,
        "set": signals.overlap,
        "bc": signals.bhattacharyya,
        "jaccard": signals.jaccard,
        "reach": signals.reach,
    }
    if (proxy := proxies.get(name)) is not None:
        return proxy
    if name == "reach":
        raise ConfigError(
            "compatibility='reach' needs the initial student's probabilities, which only training computes: "
            "choose another compatibility here"
        )
    raise ConfigError(f"compatibility={name!r} is unknown.{suggest(name, COMPATIBILITIES)}")
