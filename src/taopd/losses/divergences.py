"""Divergences between student and teacher, per position, in nats; and the sampled estimator.

Every function here returns one number per position and leaves the reduction to `reduction.py`, because the
denominator (how many tokens were selected over all micro-batches and ranks) is not known to a micro-batch.

Sign law: `*_kl` is student against teacher, >= 0 exactly for the exact sums, in expectation for
`sampled_reverse_kl`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.errors import ConfigError, require_known
from taopd.losses.head_loss import LossFunction, Targets
from taopd.losses.merged_stops import merge_columns, merged_token_ids
from taopd.losses.sampled_advantages import entropy_direction, influence_directed, sampled_tv
from taopd.losses.sampled_tail import sampled_tail_kl
from taopd.signals.merge_stops import sampled_logprobs


def reverse_kl(
    student_logprobs: Float[Tensor, "N V"], teacher_logprobs: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v)), exact over the vocabulary, nats.

    Source: arXiv 2605.26844, eq. 7.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]]).log()
        >>> reverse_kl(p, torch.tensor([[0.25, 0.75]]).log())
        tensor([0.1438])
    """
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def forward_kl(
    student_logprobs: Float[Tensor, "N V"], teacher_logprobs: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """KL(teacher || student) = sum_v p_T(v) (log p_T(v) - log p_S(v)), exact over the vocabulary, nats."""
    return reverse_kl(teacher_logprobs, student_logprobs)


def jsd(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """Generalized Jensen-Shannon: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = (1 - beta) p_S + beta p_T.

    0 < beta < 1; in nats, between 0 and ln 2 for beta = 0.5. Source: GKD, arXiv 2306.13649, as in TRL.
    """
    weights = student_logprobs.new_tensor([1.0 - beta, beta]).log()
    mixture = torch.logaddexp(student_logprobs + weights[0], teacher_logprobs + weights[1])
    return beta * reverse_kl(teacher_logprobs, mixture) + (1.0 - beta) * reverse_kl(
        student_logprobs, mixture
    )


def topk_reverse_kl(
    student_logprobs: Float[Tensor, "N V"], teacher_logprobs: Float[Tensor, "N V"], *, k: int
) -> Float[Tensor, " N"]:
    """KL(student || teacher) on K + 1 classes: the student's top-K ids and one bucket with the rest.

    A lower bound of `reverse_kl`, equal to it for k >= V - 1. Without the bucket the student may move mass
    into the tail for free. Source: Tail-Aware top-k OPD, arXiv 2608.14728.
    """
    if k >= student_logprobs.shape[-1]:
        return reverse_kl(student_logprobs, teacher_logprobs)
    ids = student_logprobs.detach().topk(k, dim=-1).indices
    outside = torch.ones_like(student_logprobs, dtype=torch.bool).scatter(1, ids, False)
    buckets = []
    for logprobs in (student_logprobs, teacher_logprobs):
        # Summed over the tail itself: 1 - sum(top-K) loses every digit when the tail is small.
        tail = logprobs.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True)
        buckets.append(torch.cat([logprobs.gather(1, ids), tail], dim=1))
    return reverse_kl(*buckets)


def routed_kl(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    k: int,
) -> Float[Tensor, " N"]:
    """Reverse KL where C >= 1/2, forward KL elsewhere; nats.

    C is the teacher's mass on the student's present top-K, without gradient. The reverse KL cannot see a
    teacher's token that the student gives no mass; the forward KL can. Source: none with this route;
    routes by other signals are in AOPD (arXiv 2605.06387), SEAD (2606.28562), CADENCE (2607.16955).
    """
    ids = student_logprobs.detach().topk(min(k, student_logprobs.shape[-1]), dim=-1).indices
    reached = teacher_logprobs.gather(1, ids).exp().sum(-1) >= 0.5
    forward = forward_kl(student_logprobs, teacher_logprobs)
    return torch.where(reached, reverse_kl(student_logprobs, teacher_logprobs), forward)


def sampled_reverse_kl(
    student_logprobs: Float[Tensor, " N"], teacher_logprobs: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """k1 estimate of KL(student || teacher) on the token the student sampled, nats; may be negative.

        log p_S(y) - log p_T(y)

    A value, not a loss: through log p_S alone its gradient is zero in expectation. The loss is
    `policy_gradient`. Source: k1 in Schulman, "Approximating KL divergence" (2020).
    """
    return student_logprobs - teacher_logprobs


def least_noise_baseline(
    student_logprobs: Float[Tensor, "N V"], teacher_logprobs: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """The baseline b at which the gradient of the sampled reverse KL varies least over the sampled token.

        b = sum_v w_v (log p_S(v) - log p_T(v)) / sum_v w_v,   w_v = p_S(v) |e_v - p_S|^2

    nats. e_v - p_S is the gradient of log p_S(v) by the logits. Not the mean of the advantage: a student
    that is sure of a token moves little when it samples it, and far when it samples another one.

    Source: the optimal constant baseline of a policy gradient, Greensmith, Bartlett and Baxter (JMLR 2004).
    """
    p = student_logprobs.exp()
    weights = p * (1.0 - 2.0 * p + p.square().sum(-1, keepdim=True))
    gaps = (student_logprobs - teacher_logprobs).masked_fill(weights == 0.0, 0.0)
    tiny = torch.finfo(weights.dtype).tiny
    return (weights * gaps).sum(-1) / weights.sum(-1).clamp_min(tiny)


FIXED_ADVANTAGE = -1.0
"""Advantage of every kept token in the teacher-free control (arXiv 2608.31046 leaves its size to the lr)."""


def policy_gradient(
    student_logprobs: Float[Tensor, " N"],
    teacher_logprobs: Float[Tensor, " N"] | None,
    *,
    sampling_logprobs: Float[Tensor, " N"] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    advantage: float | Float[Tensor, " N"] | None = None,
    baseline: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Loss whose expected gradient is that of `reverse_kl` at the position; its value is the k1 estimate.

    Both hold where the present student has sampled y, so that r = 1. With `advantage` the value is -A.

        A = -(log p_sampling(y) - log p_T(y)) + b, detached;  r = p_S(y) / p_sampling(y)
        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + b

    Args:
        sampling_logprobs: of the policy that sampled y. None: it is the student itself, so r = 1 and
            nothing is clipped (one step per rollout).
        advantage: A in place of the teacher's, which then is not read: of every token, or one for all.
        baseline: b, a constant of the position, nats; 0 if None. It changes no expectation. See
            `least_noise_baseline`.

    Source: docs/math.md; clip range of the released code.
    """
    anchor = student_logprobs.detach()
    sampling = anchor if sampling_logprobs is None else sampling_logprobs
    if advantage is None:
        assert teacher_logprobs is not None
        gain = -sampled_reverse_kl(sampling, teacher_logprobs).detach()
    else:
        gain = torch.zeros_like(anchor) + advantage
    shift = torch.zeros_like(anchor) if baseline is None else baseline.detach()
    gain = gain + shift
    ratio = (student_logprobs - sampling).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return shift - torch.minimum(ratio * gain, clipped * gain)


LOSSES: tuple[str, ...] = (
    "fixed_advantage",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "routed_kl",
    "sampled_ida",
    "sampled_reverse_kl",
    "sampled_tail_kl",
    "sampled_tv",
    "topk_reverse_kl",
)
"""Names that `resolve_loss` knows."""


SAMPLED = ("fixed_advantage", "sampled_ida", "sampled_reverse_kl", "sampled_tv")
"""Losses on the sampled token alone."""


def resolve_loss(
    name: str,
    *,
    beta: float = 0.5,
    k: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    merged_ids: Sequence[int] = (),
) -> LossFunction:
    """Return the loss of that name as a function (student log-probs [n, V], targets) -> [n].

    Args:
        beta: of `jsd`.
        k: of `topk_reverse_kl`, `sampled_tail_kl` and `routed_kl`.
        clip_low: of the losses on the sampled token, with `clip_high`.
        merged_ids: ids that count as one token in both models (ids that end a completion).

    Raises:
        ConfigError: for an unknown name.
    """
    if name in SAMPLED:
        gradient = partial(policy_gradient, clip_low=clip_low, clip_high=clip_high)

        def sampled(student: Tensor, targets: Targets) -> Tensor:
            own = sampled_logprobs(student, targets.token_ids, merged_ids=merged_ids)
            teacher, before = targets.teacher_logprobs, targets.sampling_logprobs
            if name == "fixed_advantage":
                return gradient(own, None, sampling_logprobs=before, advantage=FIXED_ADVANTAGE)
            if teacher is None:
                raise ConfigError(f"{name} needs the teacher's log-prob of the sampled token")
            gap = teacher - (own.detach() if before is None else before)
            if name == "sampled_ida":
                columns = merge_columns(student, merged_ids)
                places = merged_token_ids(targets.token_ids, merged_ids, student.shape[1])
                shrunk = influence_directed(gap, entropy_direction(columns, places))
                return gradient(own, None, sampling_logprobs=before, advantage=shrunk)
            if name == "sampled_tv":
                loss = gradient(own, None, sampling_logprobs=before, advantage=gap.sign())
                # The value, which is logged, is the distance.
                return loss - loss.detach() + sampled_tv(gap)
            baseline = None
            if targets.distribution is not None:
                rows = student.detach(), targets.distribution
                baseline = least_noise_baseline(*(merge_columns(row, merged_ids) for row in rows))
            return gradient(own, teacher, sampling_logprobs=before, baseline=baseline)

        return sampled
    if name == "sampled_tail_kl":

        def two_parts(student: Tensor, targets: Targets) -> Tensor:
            return sampled_tail_kl(
                merge_columns(student, merged_ids),
                merge_columns(targets.teacher_distribution(), merged_ids),
                merged_token_ids(targets.token_ids, merged_ids, student.shape[1]),
                k=k,
                sampling_logprobs=targets.sampling_logprobs,
            )

        return two_parts
    divergences: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": partial(jsd, beta=beta),
        "topk_reverse_kl": partial(topk_reverse_kl, k=k),
        "routed_kl": partial(routed_kl, k=k),
    }
    require_known("loss", name, LOSSES)
    divergence = divergences[name]

    def exact(student: Tensor, targets: Targets) -> Tensor:
        rows = student, targets.teacher_distribution()
        return divergence(*(merge_columns(each, merged_ids) for each in rows))

    return exact


def needs_own_samples(name: str) -> bool:
    """Whether a loss is right in expectation over the student's own distribution alone."""
    return name in SAMPLED or name == "sampled_tail_kl"


def needs_teacher_distribution(name: str) -> bool:
    """Whether a loss reads the teacher's full distribution, not only its log-prob of the sampled token."""
    return name not in SAMPLED
