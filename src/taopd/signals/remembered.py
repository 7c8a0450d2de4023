"""Reach where the initial student is not run: what it said elsewhere, remembered by token id.

    m(v) = mean of s(p_S0(v)), weighted by p_T(v)         r_i = sum over v of p_T(v) m(v)
    l(v) = mean of log p_S0(y_j) where y_j = v            in place of log p_S0(y_i), where y_i = v

s and r as in `signals.reach`; y_i is the sampled token. The means are over the positions of this batch and of
earlier ones at which the initial student S0 was run, in contexts that are not new to it. A batch counts half
as much after 34 later ones: the contexts change with the student.

What is lost: a word that S0 says in some contexts and not in others has one s for all of them.

Source: ours, measured in docs/results/reach_cheaper.md.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.kernels import Head
from taopd.signals.reach import at_temperature_1, chunks, counts

KEEPS = 0.98
"""Factor on what is remembered at every batch."""


class StartMemory:
    """The sums behind m and l, of one run.

    Args:
        sums: p_T(v), p_T(v) s(p_S0(v)), samples of v, log p_S0 of these: four rows by token id, float64.
            None: nothing is remembered.
    """

    def __init__(self, sums: Float[Tensor, "4 V"] | None = None) -> None:
        self.sums = sums

    @property
    def empty(self) -> bool:
        """No position was counted."""
        return self.sums is None or not bool(self.sums[0].any())

    def add(self, sums: Float[Tensor, "4 V"]) -> None:
        """Count the sums of a batch."""
        self.sums = sums if self.sums is None else KEEPS * self.sums + sums

    def shares(self) -> Float[Tensor, " V"]:
        """m of every token, in [0, 1]; 0 for one that the teacher never gave any mass."""
        assert self.sums is not None
        mass, counted = self.sums[:2]
        return torch.where(mass > 0.0, counted / mass, 0.0).clamp(0.0, 1.0)

    def logprobs(
        self, token_ids: Int[Tensor, " N"], otherwise: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """l of sampled tokens, nats; `otherwise` for one that was not seen."""
        assert self.sums is not None
        times, total = self.sums[2:, token_ids]
        return torch.where(times > 0.0, total / times, otherwise.double()).to(otherwise.dtype)


def sums_from_logprobs(
    counted: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    token_ids: Int[Tensor, " N"],
    initial_logprobs: Float[Tensor, " N"],
) -> Float[Tensor, "4 V"]:
    """The sums of N positions.

    Args:
        counted: s of every token, of `signals.reach.counts`.
        initial_logprobs: of the sampled tokens.
    """
    mass = teacher_logprobs.exp()
    sums = torch.zeros(4, counted.shape[1], dtype=torch.float64, device=counted.device)
    sums[0] = mass.sum(0, dtype=torch.float64)
    sums[1] = (mass * counted).sum(0, dtype=torch.float64)
    sums[2].index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.float64))
    sums[3].index_add_(0, token_ids, initial_logprobs.double())
    return sums


def reach_from_shares(
    teacher_logprobs: Float[Tensor, "N V"], shares: Float[Tensor, " V"]
) -> Float[Tensor, " N"]:
    """r of N positions from m of every token."""
    # From what is out of reach, as where the student was run.
    return (1.0 - teacher_logprobs.exp() @ (1.0 - shares).to(teacher_logprobs.dtype)).clamp(
        0.0, 1.0
    )


@torch.no_grad()
def sums_from_states(
    initial: tuple[Float[Tensor, "N D"], Head],
    teacher: tuple[Float[Tensor, "N Dt"], Head],
    token_ids: Int[Tensor, " N"],
    initial_logprobs: Float[Tensor, " N"],
    *,
    threshold: float,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> Float[Tensor, "4 V"]:
    """`sums_from_logprobs` from the states and heads of both models, in bounded memory.

    Args:
        temperature, stop_ids, foreign_ends: see `signals.reach.reach_from_states`.
    """
    (hidden, head), (teacher_hidden, teacher_head) = initial, teacher
    head, teacher_head = head.cast(hidden.dtype), teacher_head.cast(teacher_hidden.dtype)
    total = torch.zeros(4, head.vocab_size, dtype=torch.float64, device=hidden.device)
    for rows in chunks(hidden, head):
        logprobs = at_temperature_1(head.logprobs(hidden[rows], temperature), temperature)
        total += sums_from_logprobs(
            counts(logprobs, threshold, stop_ids, foreign_ends),
            teacher_head.logprobs(teacher_hidden[rows], temperature),
            token_ids[rows],
            initial_logprobs[rows],
        )
    return total


@torch.no_grad()
def remembered_reach(
    teacher_hidden: Float[Tensor, "N Dt"],
    teacher_head: Head,
    shares: Float[Tensor, " V"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """`reach_from_shares` from the teacher's states and head, in bounded memory."""
    teacher_head = teacher_head.cast(teacher_hidden.dtype)
    parts = [
        reach_from_shares(teacher_head.logprobs(teacher_hidden[rows], temperature), shares)
        for rows in chunks(teacher_hidden, teacher_head)
    ]
    return torch.cat(parts)
