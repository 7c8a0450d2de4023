"""Losses: divergences per position, the chunked loss at selected positions, and the reduction."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from taopd.errors import ConfigError, suggest
from taopd.losses.divergences import (
    FIXED_ADVANTAGE,
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
    routed_kl,
    sampled_reverse_kl,
    topk_reverse_kl,
)
from taopd.losses.head_loss import LossFunction, Targets, head_loss
from taopd.losses.merged_stops import merge_columns, sampled_logprobs
from taopd.losses.reduction import anchor_weights, reduction_weights

__all__ = [
    "LOSSES",
    "LossFunction",
    "Targets",
    "anchor_weights",
    "forward_kl",
    "head_loss",
    "jsd",
    "merge_columns",
    "needs_teacher_distribution",
    "policy_gradient",
    "reduction_weights",
    "resolve_loss",
    "reverse_kl",
    "routed_kl",
    "sampled_reverse_kl",
    "topk_reverse_kl",
]

LOSSES: tuple[str, ...] = (
    "fixed_advantage",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "routed_kl",
    "sampled_reverse_kl",
    "topk_reverse_kl",
)
"""Names that `resolve_loss` knows."""

SAMPLED = ("fixed_advantage", "sampled_reverse_kl")
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
        k: of `topk_reverse_kl`.
        clip_low: of the losses on the sampled token, with `clip_high`.
        merged_ids: ids that count as one token in both models (ids that end a completion).

    Raises:
        ConfigError: for an unknown name.
    """
    if name in SAMPLED:

        def sampled(student: Tensor, targets: Targets) -> Tensor:
            advantage = None if name == "sampled_reverse_kl" else FIXED_ADVANTAGE
            if advantage is None and targets.teacher_logprobs is None:
                raise ConfigError(
                    "sampled_reverse_kl needs the teacher's log-prob of the sampled token"
                )
            return policy_gradient(
                sampled_logprobs(student, targets.token_ids, merged_ids=merged_ids),
                targets.teacher_logprobs,
                sampling_logprobs=targets.sampling_logprobs,
                clip_low=clip_low,
                clip_high=clip_high,
                advantage=advantage,
            )

        return sampled
    divergences: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": partial(jsd, beta=beta),
        "topk_reverse_kl": partial(topk_reverse_kl, k=k),
        "routed_kl": partial(routed_kl, k=k),
    }
    if name not in divergences:
        raise ConfigError(f"loss={name!r} is unknown.{suggest(name, LOSSES)}")
    divergence = divergences[name]

    def exact(student: Tensor, targets: Targets) -> Tensor:
        teacher = targets.teacher_distribution()
        return divergence(merge_columns(student, merged_ids), merge_columns(teacher, merged_ids))

    return exact


def needs_teacher_distribution(name: str) -> bool:
    """Whether a loss reads the teacher's full distribution, not only its log-prob of the sampled token."""
    return name not in SAMPLED
