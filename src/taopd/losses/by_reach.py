"""The loss of `method: reach`: one divergence for what the initial student could have said, one for the rest.

    r l + (1 - r - f) KL(p_T' || p_S)     at a selected token, l the loss of the run
    l                                     at a token that is held to the teacher; KL(p_S || p_T) where l reads
                                          the sampled token alone

f is the teacher's mass on foreign ends (`signals.reach`), p_T' the teacher without them. They are never
taught: the student's sampler goes on at them, and what it writes then is no answer.

The sampled reverse KL has the baseline with the least noise, which the distributions give: without it the
noise drowns out the hold (docs/results/reach_forms.md). The other losses on the sampled token have none, and
are divided by all tokens (`trainer.reach_sums.used_share`).

The gradient of the reverse KL at a token is proportional to the student's probability of it: what the student
hardly ever says stays there, while what it says in its place is pushed down and anything else comes up. The
forward KL raises the teacher's word itself.

Source: ours, measured in docs/results/default.md.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.losses.divergences import least_noise_baseline, resolve_loss
from taopd.losses.head_loss import LossFunction, Targets
from taopd.losses.merged_stops import merge_columns

NEVER = -1e4
"""Nats: a probability of 0 in float32 that still has a product with 0."""


def by_reach(
    function: LossFunction,
    exact: LossFunction,
    *,
    merged_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> LossFunction:
    """The loss that reads `Targets.reach` and `Targets.held`, and is `function` where they are None.

    Of a teacher elsewhere there is no distribution: then r l, and l at what is held.

    Args:
        function: l. exact: the loss at tokens that are held, where l reads the sampled token alone.
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
        targets = replace(targets, distribution=targets.teacher_distribution())
        if targets.held is None:
            within = function(student, targets)
        else:
            rows = student.detach(), targets.teacher_distribution()
            baseline = least_noise_baseline(*(merge_columns(each, merged_ids) for each in rows))
            within = function(student, replace(targets, baseline=baseline))
            within = torch.where(targets.held, exact(student, targets), within)
        beyond = 1.0 - r
        if foreign_ends:
            taught, mass = without_ids(targets.teacher_distribution(), foreign_ends)
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
