"""What `method: reach` counts over a generation batch: how long the start is held, in which order it selects,
and what it divides by.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError
from taopd.losses import held_share, needs_teacher_distribution, start_share
from taopd.selectors import Selection, Selector
from taopd.selectors.formulas import LEAST_REACH, not_held_back
from taopd.signals import FOREIGN, INITIAL, SignalTable
from taopd.trainer.settings.methods import orders

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

RARELY = 0.1
"""A token is new where the initial student gave it less than this share of what both models give it."""
KNOWN_SHARE = 0.5
"""Share of positions in contexts without a new token, from which on the start is held in full; at half of
this share it is not held longer: there is no way back."""
MOSTLY = 0.5
"""Least r of a position whose D tells how well a context is learned."""
WORSE = 0.2
"""Nats by which contexts with a new token are worse, from which on the start is held in full."""

_READS = ("reach", INITIAL, "student_logprobs", "teacher_logprobs")


def used_share(selection: Selection, loss: str, distribution: bool) -> float:
    """Selected tokens over those by which `method: reach` divides: the budget, used up or not, or all valid.

    The loss at a sampled token says nothing about the tokens that were not drawn. Multiplied by 1 / budget
    its noise drowns out the hold, unless a baseline takes it off: measured in docs/results/reach_forms.md.

    Args:
        distribution: the teacher's full distribution is at hand.
    """
    # A fixed advantage has no baseline: it would be all of it.
    quiet = needs_teacher_distribution(loss) or (distribution and loss == "sampled_reverse_kl")
    whole = selection.num_budget if quiet else selection.num_valid
    return min(1.0, selection.num_kept / max(1, whole))


def ordering(config: "TeachabilityConfig", held_back: Float[Tensor, " N"] | None) -> str | Selector:
    """The selector whose score orders the tokens: under the rule of `reach` D~ (1 - h)^2, h as it is.

    h is a share of mass and needs no scale. Where the student could say nearly everything (the SmolLM2-135M
    pair: r from 0.9996 to 1 between its 5 and 95 % quantiles), a scale of the batch would drop large D for an
    r of 0.999.

    Args:
        held_back: h, of `judge`; None where the rule does not judge.
    """
    if held_back is None or not orders(config):
        return str(config.selector)
    return Selector(
        name="reach",
        scores=lambda view: not_held_back(view.d, held_back),
        bounded=True,
        local=True,
    )


def in_new_context(table: SignalTable) -> Bool[Tensor, " N"]:
    """Positions that come after a token of the completion which the student took over from the teacher: both
    say it ten times as often as the initial student did.

    p_S0(y_j) < 0.1 min(p_S(y_j), p_T(y_j))    for a j before i

    A token that the student alone says more often is a slip, of which it makes many at a high learning rate:
    the start is what holds it there. Source: ours, docs/results/reach_forms.md.
    """
    models = (table.extra[name] for name in (INITIAL, "student_logprobs", "teacher_logprobs"))
    return after_new_words(*models, completion=table.completion)


def after_new_words(
    initial: Float[Tensor, " N"],
    student: Float[Tensor, " N"],
    teacher: Float[Tensor, " N"],
    *,
    completion: Int[Tensor, " N"],
) -> Bool[Tensor, " N"]:
    """`in_new_context` from the log-probs of the sampled tokens; of whole completions, each contiguous."""
    new = initial < torch.minimum(student, teacher) + math.log(RARELY)
    before = new.long().cumsum(0) - new.long()
    # Less what was counted in the completions before.
    completion = completion.contiguous()
    first = torch.searchsorted(completion, completion)
    return before > before[first]


class Judged(NamedTuple):
    """What `method: reach` decides by at every token."""

    reach: Float[Tensor, " N"]
    """r' of `judged_reach`: what may be selected."""
    held_back: Float[Tensor, " N"]
    """h = f + g, which orders what is selected; g of `losses.held_share`, by r' and the lambda of
    `start_shares`."""
    at_start: Float[Tensor, " N"]
    """Share of the hold at the initial student: g. Of a teacher elsewhere h: without its distribution nothing
    teaches the student's own end where the teacher ends (`losses.ended_alike`)."""
    divides: Float[Tensor, " N"]
    """r by which the loss is divided; r' without a distribution, which the forward KL beyond r needs."""


def judge(table: SignalTable, *, step: int, num_steps: int, distribution: bool) -> Judged:
    """Judge every token.

    Args:
        num_steps: of the whole run; 0: not known.
        distribution: the teacher's full distribution is at hand.

    Raises:
        ConfigError: the table lacks a column that is read, as one that no trainer made.
    """
    missing = [name for name in _READS if name not in table.extra]
    if missing:
        raise ConfigError(
            f"method: reach reads the signal {missing[0]!r}, which this table does not hold: only who "
            "has the student before training can put it there (docs/guide.md); else set method='anchored' or "
            "'published'"
        )
    new = in_new_context(table)
    reach = judged_reach(table, new)
    start = start_shares(table, new, step=step, num_steps=num_steps)
    foreign = table.extra.get(FOREIGN, torch.zeros_like(reach))
    held = held_share(reach, foreign, start=start)
    held_back = foreign + held
    if not distribution:
        return Judged(reach, held_back, at_start=held_back, divides=reach)
    return Judged(reach, held_back, at_start=held, divides=table.extra["reach"])


def judged_reach(table: SignalTable, new: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """r by which a token is selected and held: 1 - f in a context that is new to the initial student.

    It is no judge there: what it would say in a context that it hardly ever came to is chance. That would be
    held, and what is right not be taught. Source: ours, docs/results/reach_forms.md.

    Args:
        new: of `in_new_context`.
    """
    return torch.where(new, 1.0 - table.extra.get(FOREIGN, 0.0), table.extra["reach"])


def start_shares(
    table: SignalTable, new: Bool[Tensor, " N"], *, step: int, num_steps: int, least: float = 0.0
) -> Float[Tensor, " N"]:
    """lambda of every token: let go over the first half of a run, at least 100 steps, or later while the
    contexts that the student has newly come to are ones in which it has yet to learn what is within reach.

        l                                                    where r < 0.01;  l = `start_share`
        max(l, min(1, (w' - w - least) / (0.2 nats)) max(0, min(1, 4 k - 1)))   else

    w' is the mean of D [r >= 1/2] over the positions that are `in_new_context`, w that over the others, k the
    share of these others. A student that takes over words it hardly said meets contexts that are new to it,
    and its answers are wrong there until it has learned what follows. The start is then held, until it has,
    or until hardly any context is left that the start knows: then nothing is saved by holding it. What is
    too far away to be selected has no other teaching than that of the hold. Source: ours,
    docs/results/reach_forms.md.

    Args:
        new: of `in_new_context`.
        num_steps: of the whole run; 0: not known, then 1.
        least: nats; more than 0 was tried and left, see docs/results/reach_longer.md.
    """
    early, reach = start_share(step, num_steps), table.extra["reach"]
    new, known = table.valid & new, table.valid & ~new
    within = torch.where(reach >= MOSTLY, table.disagreement, 0.0).double()
    parts = [within[new].sum(), within[known].sum(), new.double().sum(), known.double().sum()]
    worse_sum, known_sum, num_new, num_known = table.ranks.sums(torch.stack(parts)).tolist()
    held = 0.0
    if num_new and num_known:
        worse = worse_sum / num_new - known_sum / num_known
        known_share = num_known / (num_new + num_known)
        held = min(1.0, max(0.0, worse - least) / WORSE)
        held *= min(1.0, max(0.0, 2.0 * known_share / KNOWN_SHARE - 1.0))
    shares = torch.full_like(reach, max(early, held), dtype=torch.float64)
    return shares.masked_fill(reach < LEAST_REACH, early)
