"""Situation: on what kind of tokens a pair's disagreement lies.

    share of kind = sum of D over the tokens of that kind / sum of D

    foreign ends    f > 1/2                         the teacher ends with a token of its own (`signals.reach`)
    out of reach    r <= 1/2                        the student hardly ever says what the teacher would say
    within reach    r > 1/2 and C <= 1/2            it may say it, but not among its best K
    teachable       r > 1/2 and C > 1/2             it is among the student's best K

A token is of the first kind that it fits. D is KL(teacher || student) on both top-K lists: the shares are of
what the teacher would change. Source: ours; a diagnostic's incompatible tokens, C at most 1/2, are divided by
reach.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from taopd.signals.drift import at_ids
from taopd.signals.reach import foreign_bound, reach_bound
from taopd.signals.types import TokenSignals

HALF = 0.5
"""Teacher mass above which a token counts as one kind."""


class Situation(NamedTuple):
    """Sums of D by kind, nats."""

    teachable: float
    within_reach: float
    out_of_reach: float
    foreign_ends: float = 0.0

    def __add__(self, other: tuple) -> "Situation":
        return Situation(*(own + more for own, more in zip(self, other, strict=True)))

    @property
    def shares(self) -> "Situation":
        """Shares that sum to 1; all 0 where there is no disagreement."""
        total = sum(self)
        return Situation(*(value / total if total > 0.0 else 0.0 for value in self))


def situation(
    signals: TokenSignals, *, threshold: float, foreign_ends: Sequence[int] = ()
) -> Situation:
    """Sums of D by kind over N positions.

    Reach is the initial student's where the trainer has added it; else that of the student at hand by the ids
    of both lists, which before the first step is the same student. That is a lower bound of r: the share out
    of reach is then one at most.
    """
    reach = signals.reach
    if reach is None:
        reach = own_reach(signals, threshold=threshold, foreign_ends=foreign_ends)
    # More than half of the mass is on the teacher's list, whatever its length, unless there are many ends.
    goes_on = foreign_bound(signals, foreign_ends) <= HALF
    said, listed = goes_on & (reach > HALF), signals.compatibility > HALF
    kinds = (said & listed, said & ~listed, goes_on & ~said, ~goes_on)
    return Situation(*(float(signals.disagreement[kind].double().sum()) for kind in kinds))


def own_reach(
    signals: TokenSignals, *, threshold: float, foreign_ends: Sequence[int]
) -> Float[Tensor, " N"]:
    """Lower bound of r if the student that was scored is the initial one.

    Of the lists' own temperature: above 1 they call words likelier than `signals.reach` does.
    """
    at_teachers = signals.student_at_teacher_ids
    if at_teachers is None:
        at_teachers = at_ids(
            signals.student_topk_ids, signals.student_topk_logprobs, signals.teacher_topk_ids
        )
    at_students = signals.student_topk_logprobs
    return reach_bound(
        signals, at_students, at_teachers, threshold=threshold, foreign_ends=foreign_ends
    )
