"""Losses: divergences per position, the chunked loss at selected positions, and the reduction."""

from taopd.losses.by_reach import by_reach, ended_alike
from taopd.losses.divergences import (
    LOSSES,
    forward_kl,
    jsd,
    least_noise_baseline,
    needs_own_samples,
    needs_teacher_distribution,
    policy_gradient,
    resolve_loss,
    reverse_kl,
    routed_kl,
    sampled_reverse_kl,
    topk_reverse_kl,
)
from taopd.losses.head_loss import LossFunction, Targets, head_loss
from taopd.losses.merged_stops import merge_columns
from taopd.losses.reduction import (
    anchor_weights,
    drawn_completions,
    held_share,
    reduction_weights,
    start_share,
)
from taopd.losses.sampled_advantages import entropy_direction
from taopd.losses.sampled_tail import sampled_tail_kl

__all__ = [
    "LOSSES",
    "LossFunction",
    "Targets",
    "anchor_weights",
    "by_reach",
    "drawn_completions",
    "ended_alike",
    "entropy_direction",
    "forward_kl",
    "head_loss",
    "held_share",
    "jsd",
    "least_noise_baseline",
    "merge_columns",
    "needs_own_samples",
    "needs_teacher_distribution",
    "policy_gradient",
    "reduction_weights",
    "resolve_loss",
    "reverse_kl",
    "routed_kl",
    "sampled_reverse_kl",
    "sampled_tail_kl",
    "start_share",
    "topk_reverse_kl",
]
