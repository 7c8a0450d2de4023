"""Losses: divergences per position, the chunked loss at selected positions, and the reduction."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from taopd.errors import ConfigError, suggest
from taopd.losses.divergences import (
    forward_kl,
    jsd,
    policy_gradient,
    reverse_kl,
    sampled_reverse_kl,
    topk_reverse_kl,
)
from taopd.losses.head_loss import LossFunction, Targets, head_loss
from taopd.losses.weights import anchor_weights, reduction_weights

__all__ = [
    "LOSSES",
    "LossFunction",
    "Targets",
    "anchor_weights",
    "forward_kl",
    "head_loss",
    "jsd",
    "needs_teacher_distribution",
    "policy_gradient",
    "reduction_weights",
    "resolve_loss",
    "reverse_kl",
    "sampled_reverse_kl",
    "topk_reverse_kl",
]

LOSSES: tuple[str, ...] = (
    "forward_kl",
    "jsd",
    "reverse_kl",
    "sampled_reverse_kl",
    "topk_reverse_kl",
)
"""Names that `resolve_loss` knows."""


def resolve_loss(
    name: str,
    *,
    beta: float = 0.5,
    k: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> LossFunction:
    """Return the loss of that name as a function (student log-probs [n, V], targets) -> [n].

    Args:
        beta: of `jsd`.
        k: of `topk_reverse_kl`.
        clip_low: of `sampled_reverse_kl`, with `clip_high`.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "sampled_reverse_kl":

        def sampled(student: Tensor, targets: Targets) -> Tensor:
            if targets.teacher_logprobs is None:
                raise ConfigError(
                    "sampled_reverse_kl needs the teacher's log-prob of the sampled token"
                )
            return policy_gradient(
                student.gather(1, targets.token_ids.unsqueeze(1)).squeeze(1),
                targets.teacher_logprobs,
                sampling_logprobs=targets.sampling_logprobs,
                clip_low=clip_low,
                clip_high=clip_high,
            )

        return sampled
    divergences: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": partial(jsd, beta=beta),
        "topk_reverse_kl": partial(topk_reverse_kl, k=k),
    }
    if name not in divergences:
        raise ConfigError(f"loss={name!r} is unknown.{suggest(name, LOSSES)}")
    divergence = divergences[name]

    def exact(student: Tensor, targets: Targets) -> Tensor:
        return divergence(student, targets.teacher_distribution())

    return exact


def needs_teacher_distribution(name: str) -> bool:
    """Whether a loss reads the teacher's full distribution, not only its log-prob of the sampled token."""
    return name != "sampled_reverse_kl"
