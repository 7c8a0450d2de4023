"""`signals="topk_lists"`: what can be said of a position from two top-K lists alone.

What: the arithmetic of the released code (docs/released-code.md, R1-R6), for all positions at once.

Why not the exact signals: a server that returns only its own top-K log-probs gives nothing better.
An id missing from one list counts as probability 0 there, is floored at 1e-12 after
renormalization, and is not renormalized again; so every unit of teacher mass off the student's list
adds 20 to 28 nats to the disagreement D. D from lists is therefore nearly a decreasing function of
C; `taopd.signals` has the exact ones.

Source: docs/released-code.md; arXiv 2605.26844, eq. 3, 4, 9, 10, 17.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError, ShapeError
from taopd.signals.arithmetic import TORCH, Arithmetic
from taopd.signals.list_support import (
    finite,
    list_entropy,
    read_support,
    sum_in_order,
    target_rank,
    union_geometry,
)
from taopd.signals.types import TokenSignals, concatenate

BLOCK_ROWS = 2048
"""Positions handled at once on a CPU, so that [2 K, rows] of float64 stays in its cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListMetrics:
    """Everything two top-K lists say about N positions; nats unless said otherwise."""

    disagreement: Float[Tensor, " N"]
    """D = KL(teacher || student) on the union. [R3]"""
    reverse_disagreement: Float[Tensor, " N"]
    bhattacharyya: Float[Tensor, " N"]
    compatibility: Float[Tensor, " N"]
    """C from the teacher's log-probs at the student's ids where given, else the bound. [R2]"""
    compatibility_bound: Float[Tensor, " N"]
    """Lower bound of C: teacher-list probability on the student's ids. [eq. 17]"""
    compatibility_is_exact: bool
    overlap: Float[Tensor, " N"]
    """|S_S intersect S_T| / K with the configured K. [R5]"""
    jaccard: Float[Tensor, " N"]
    student_entropy_nats: Float[Tensor, " N"]
    teacher_entropy_nats: Float[Tensor, " N"]
    student_entropy: Float[Tensor, " N"]
    """Divided by ln(max(n, 2)), n the number of positive probabilities; in [0, 1]. [R4]"""
    teacher_entropy: Float[Tensor, " N"]
    student_mass: Float[Tensor, " N"]
    """Probability of the whole list."""
    teacher_mass: Float[Tensor, " N"]
    teacher_best_reached: Bool[Tensor, " N"]
    """Is the teacher's first id in the student's list?"""
    student_target_rank: Int[Tensor, " N"] | None
    """1-based rank of the target in the student's list, 0 where it is not there. [R6]"""
    teacher_target_rank: Int[Tensor, " N"] | None
    student_ids: Int[Tensor, "N K"]
    """The lists after R1: compacted, -1 and -inf at the end."""
    student_logprobs: Float[Tensor, "N K"]
    teacher_ids: Int[Tensor, "N K"]
    teacher_logprobs: Float[Tensor, "N K"]


def list_metrics(
    student_ids: Int[Tensor, "N K"],
    student_logprobs: Float[Tensor, "N K"],
    teacher_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    *,
    k: int,
    teacher_logprobs_at_student_ids: Float[Tensor, "N K"] | None = None,
    target_ids: Int[Tensor, " N"] | None = None,
    arithmetic: Arithmetic = TORCH,
) -> ListMetrics:
    """Everything R1-R6 of docs/released-code.md define for two top-K lists per position, in float64.

        p' = max(p / mass, 1e-12) on U = S_S union S_T      D = sum_U p'_T (ln p'_T - ln p'_S)
        C = clamp01(sum over S_S of p_T)                    H = entropy(list / mass) / ln(max(n, 2))

    Args:
        student_ids: best first; a short list ends in id -1 with log-prob -inf.
        teacher_logprobs_at_student_ids: aligned with `student_ids`; non-finite counts as 0. None:
            the teacher's own list is all that is known and C is its lower bound.
        k: the configured K, divisor of the overlap even where lists are shorter (R5).

    Raises:
        ShapeError: if two inputs disagree. ConfigError: if k < 1.
    """
    shape = (student_ids.shape[0], student_ids.shape[-1])
    columns = {
        "student_ids": student_ids,
        "student_logprobs": student_logprobs,
        "teacher_ids": teacher_ids,
        "teacher_logprobs": teacher_logprobs,
        "teacher_logprobs_at_student_ids": teacher_logprobs_at_student_ids,
        "target_ids": target_ids,
    }
    if k < 1:
        raise ConfigError(f"k={k} must be at least 1; it is the K of both top-K lists")
    if shape[1] < 1:
        raise ShapeError("student_ids: the lists need at least one column; pad with id -1")
    for name, value in columns.items():
        expected = shape[:1] if name == "target_ids" else shape
        if value is not None and tuple(value.shape) != expected:
            raise ShapeError(
                f"{name}: expected {list(expected)}, got {list(value.shape)}; pad short lists with "
                "id -1 and log-prob -inf"
            )
    # A GPU takes all positions at once: only a CPU's cache needs the blocks.
    size = BLOCK_ROWS if student_ids.device.type == "cpu" else max(1, shape[0])
    blocks = []
    for start in range(0, max(1, shape[0]), size):
        rows = slice(start, start + size)
        part: dict[str, Any] = {
            name: None if column is None else column[rows] for name, column in columns.items()
        }
        blocks.append(_block_metrics(**part, k=k, arithmetic=arithmetic))
    return blocks[0] if len(blocks) == 1 else concatenate(blocks)


def _block_metrics(
    student_ids: Tensor,
    student_logprobs: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_logprobs_at_student_ids: Tensor | None,
    target_ids: Tensor | None,
    *,
    k: int,
    arithmetic: Arithmetic,
) -> ListMetrics:
    student = read_support(student_ids, student_logprobs, arithmetic)
    teacher = read_support(teacher_ids, teacher_logprobs, arithmetic)
    student_keys, teacher_keys = student.keys(-1), teacher.keys(-2)
    at_student = torch.zeros_like(student.probs)
    match, found = torch.empty_like(at_student), torch.empty_like(at_student)
    for column in range(student_ids.shape[1]):
        torch.eq(student_keys, teacher_keys[column], out=match)  # 1 at the one match, if any
        at_student.addcmul_(match, teacher.probs[column])
        torch.amax(match, 0, out=found[column])
    shared = found.bool()
    num_shared = shared.sum(0)
    num_union = student.member.sum(0) + teacher.member.sum(0) - num_shared
    forward, reverse, bhattacharyya = union_geometry(
        student, teacher, at_student, teacher.member & ~shared, arithmetic
    )
    bound = sum_in_order(at_student).clamp_(0.0, 1.0)
    compatibility = bound
    if teacher_logprobs_at_student_ids is not None:
        known = teacher_logprobs_at_student_ids.T.double()
        known = known if student.order is None else known.gather(0, student.order)
        known = arithmetic.exp(known.masked_fill(~finite(known), -torch.inf))
        compatibility = sum_in_order(known.masked_fill(~student.member, 0.0)).clamp_(0.0, 1.0)
    student_mass, teacher_mass = sum_in_order(student.probs), sum_in_order(teacher.probs)
    student_nats, student_scaled = list_entropy(student, student_mass, arithmetic)
    teacher_nats, teacher_scaled = list_entropy(teacher, teacher_mass, arithmetic)
    return ListMetrics(
        disagreement=forward,
        reverse_disagreement=reverse,
        bhattacharyya=bhattacharyya,
        compatibility=compatibility,
        compatibility_bound=bound,
        compatibility_is_exact=teacher_logprobs_at_student_ids is not None,
        overlap=num_shared.double() / k,
        jaccard=num_shared.double() / num_union.clamp(min=1),
        student_entropy_nats=student_nats,
        teacher_entropy_nats=teacher_nats,
        student_entropy=student_scaled,
        teacher_entropy=teacher_scaled,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        teacher_best_reached=shared[0],
        student_target_rank=None if target_ids is None else target_rank(student, target_ids),
        teacher_target_rank=None if target_ids is None else target_rank(teacher, target_ids),
        student_ids=student.lists[0],
        student_logprobs=student.lists[1],
        teacher_ids=teacher.lists[0],
        teacher_logprobs=teacher.lists[1],
    )


def topk_lists_signals(
    student_ids: Int[Tensor, "N K"],
    student_logprobs: Float[Tensor, "N K"],
    teacher_ids: Int[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N K"],
    *,
    k: int,
    teacher_logprobs_at_student_ids: Float[Tensor, "N K"] | None = None,
    target_ids: Int[Tensor, " N"] | None = None,
) -> TokenSignals:
    """Signals of N positions from two top-K lists each: `list_metrics` as a selector reads them.

    D is in nats and floored, C is exact only with `teacher_logprobs_at_student_ids`, both entropies
    are divided by ln(n). `target_ids` is checked for shape; ranks of the target are in `list_metrics`.

    Raises:
        ShapeError: if two inputs disagree. ConfigError: if k < 1.

    Source: docs/released-code.md, R1-R6.
    """
    metrics = list_metrics(
        student_ids,
        student_logprobs,
        teacher_ids,
        teacher_logprobs,
        k=k,
        teacher_logprobs_at_student_ids=teacher_logprobs_at_student_ids,
        target_ids=target_ids,
    )
    return TokenSignals(
        disagreement=metrics.disagreement,
        compatibility=metrics.compatibility,
        entropy=metrics.student_entropy,
        teacher_entropy=metrics.teacher_entropy,
        reverse_disagreement=metrics.reverse_disagreement,
        bhattacharyya=metrics.bhattacharyya,
        overlap=metrics.overlap,
        jaccard=metrics.jaccard,
        compatibility_is_exact=metrics.compatibility_is_exact,
        compatibility_bound=metrics.compatibility_bound,
        student_topk_ids=metrics.student_ids,
        student_topk_logprobs=metrics.student_logprobs,
        teacher_topk_ids=metrics.teacher_ids,
        teacher_topk_logprobs=metrics.teacher_logprobs,
        token_ids=target_ids,
        teacher_at_student_ids=teacher_logprobs_at_student_ids,
    )


def lists_from_exact(signals: TokenSignals) -> TokenSignals:
    """Recompute D, H and the proxies from the two top-K lists alone; C stays the exact mass.

    `compatibility="bound"` selects the lower bound that the lists alone give. Carried over is what a
    teacher's server can give beside its list: log-probs of the sampled token and of the student's ids; and H,
    as `full_entropy`.
    """
    lists = topk_lists_signals(
        signals.student_topk_ids,
        signals.student_topk_logprobs,
        signals.teacher_topk_ids,
        signals.teacher_topk_logprobs,
        k=signals.student_topk_ids.shape[1],
    )
    return replace(
        lists,
        compatibility=signals.compatibility,
        compatibility_is_exact=signals.compatibility_is_exact,
        student_logprobs=signals.student_logprobs,
        teacher_logprobs=signals.teacher_logprobs,
        token_ids=signals.token_ids,
        teacher_at_student_ids=signals.teacher_at_student_ids,
        full_entropy=signals.entropy,
    )
