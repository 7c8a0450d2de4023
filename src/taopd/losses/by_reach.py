"""The loss of `method: reach`: one divergence for what the initial student could have said, one for the rest.

    r l + (1 - r - f) KL(p_T' || p_S)     at a selected token, l the loss of the run
    l                                     at a token that is held to the teacher; KL(p_S || p_T) where l reads
                                          the sampled token alone; `ended_alike` where the ends differ

f is the teacher's mass on foreign ends (`signals.reach`), p_T' the teacher without them. They are never
taught: the student's sampler goes on at them, and what it writes then is no answer. Where the teacher ends
with one, the student learns to end in its own way.

The sampled reverse KL has the baseline with the least noise, which the distributions give: without it the
noise drowns out the hold (docs/results/reach_forms.md). The other losses on the sampled token have none, and
are divided by all tokens (`trainer.reach_sums.used_share`).

The gradient of the reverse KL at a token is proportional to the student's probability of it: what the student
hardly ever says stays there, while what it says in its place is pushed down and anything else comes up. The
forward KL raises the teacher's word itself.

Source: ours, measured in docs/results/default.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.losses.divergences import resolve_loss
from taopd.losses.head_loss import LossFunction, Targets

NEVER = -1e4
"""Nats: a probability of 0 in float32 that still has a product with 0."""


def by_reach(
    function: LossFunction,
    at_held: LossFunction | None = None,
    *,
    merged_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> LossFunction:
    """The loss that reads `Targets.reach` and `Targets.held`, and is `function` where they are None.

    Of a teacher elsewhere there is no distribution: then r l, and l at what is held.

    Args:
        function: l.
        at_held: the loss at tokens that are held, where it is another one than l.
        merged_ids: ids that count as one token in both models.
        foreign_ends: ids that end the teacher's texts alone; some may lie outside the shared vocabulary.
    """
    forward = resolve_loss("forward_kl", merged_ids=merged_ids)

    def loss(student: Tensor, targets: Targets) -> Tensor:
        r = targets.reach
        if r is None:
            return function(student, targets)
        if targets.teacher_hidden is None:
            return r * function(student, targets)
        # One pass of the teacher's head for all parts.
        teacher = targets.teacher_distribution()
        targets = replace(targets, distribution=teacher)
        within = function(student, targets)
        if at_held is not None:
            assert targets.held is not None
            within = torch.where(targets.held, at_held(student, targets), within)
        beyond = 1.0 - r
        if foreign_ends:
            taught, mass = without_ids(teacher, foreign_ends)
            targets = replace(targets, distribution=taught)
            # A held token has r = 1, whatever the teacher says there.
            beyond = (beyond - mass).clamp_min(0.0)
        return r * within + beyond * forward(student, targets)

    return loss


def without_ids(
    logprobs: Float[Tensor, "N V"], ids: Sequence[int]
) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """Log-probs given that none of these ids comes, nats, and the mass that the ids had."""
    inside = [index for index in ids if index < logprobs.shape[1]]
    mass = logprobs[:, inside].exp().sum(1)
    rest = logprobs.clone()
    rest[:, inside] = NEVER
    return rest.log_softmax(1), mass


def ended_alike(
    resolve: Callable[..., LossFunction],
    foreign_ends: Sequence[int],
    own_ends: Sequence[int],
    *,
    merged_ids: Sequence[int] = (),
) -> LossFunction:
    """A loss that teaches the student to end where the teacher does, and in its own way:

        l* + p_T(ends) log(p_S(ends) / p_S(own ends))

    l* is l with the ends of both models as one token: the teacher says whether the text ends. The other term
    says with which token. Where the student has no end that the teacher knows, l given that no end of the
    teacher comes.

    Args:
        resolve: gives l for its `merged_ids`.
        foreign_ends: ids that end the teacher's texts alone; own_ends: ids that end the student's. All of
            them in the shared vocabulary.
        merged_ids: ids that count as one token in both models.
    """
    if not own_ends:
        plain = resolve(merged_ids=merged_ids)

        def given_that_none_comes(student: Tensor, targets: Targets) -> Tensor:
            teacher, _ = without_ids(targets.teacher_distribution(), foreign_ends)
            rest, _ = without_ids(student, foreign_ends)
            return plain(rest, replace(targets, distribution=teacher))

        return given_that_none_comes
    ends = [*own_ends, *foreign_ends]
    as_one = resolve(merged_ids=sorted({*merged_ids, *ends}))

    def loss(student: Tensor, targets: Targets) -> Tensor:
        teacher_ends = targets.teacher_distribution()[:, ends].exp().sum(1)
        which = student[:, ends].logsumexp(1) - student[:, list(own_ends)].logsumexp(1)
        return as_one(student, targets) + teacher_ends * which

    return loss
