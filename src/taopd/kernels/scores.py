"""What scoring returns, and the arithmetic that all implementations share once a pass is done.

A pass over the vocabulary leaves a few running sums per position (`Scan`); entropy, log-probs and the
divergence on the union of two supports are arithmetic on those and on a few gathered logits. Log-probs at
given ids are a matmul with the gathered rows of the head (N K D multiplications): exact up to rounding, and
the ids need not be known before the pass.

Source: arXiv 2605.26844, eq. 3, 4, 9, 10, 17; online log-sum-exp: Milakov and Gimelshein (2018).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.kernels.head import Head

GATHER_ELEMENTS = 2**22
"""Gathered head entries held at a time (16 MiB in float32)."""


class TopKScores(NamedTuple):
    """One model at N positions. Log-probs and entropy in nats, float32 (float64 for float64 states)."""

    target_logprobs: Float[Tensor, " N"]
    """log p(target)."""
    topk_logprobs: Float[Tensor, "N K"]
    """Descending; ties broken by lower id."""
    topk_ids: Int[Tensor, "N K"]
    logsumexp: Float[Tensor, " N"]
    """Of logits / temperature."""
    entropy: Float[Tensor, " N"]
    want_logprobs: Float[Tensor, "N W"] | None = None
    """log p of the ids asked for."""


class PairScores(NamedTuple):
    """Student and teacher at the same N positions, and how they differ; nats."""

    student: TopKScores
    """`want_logprobs` are at the teacher's top-K ids."""
    teacher: TopKScores
    """`want_logprobs` are at the student's top-K ids."""
    disagreement: Float[Tensor, " N"]
    """D = KL(teacher || student) on the union of supports, both renormalized there."""
    reverse_disagreement: Float[Tensor, " N"]
    bhattacharyya: Float[Tensor, " N"]
    compatibility: Float[Tensor, " N"]
    """C, teacher mass on the student's top-K; in [0, 1]."""
    compatibility_bound: Float[Tensor, " N"]
    """Teacher mass on the ids in both lists; in [0, 1]."""
    num_shared: Float[Tensor, " N"]
    """How many ids are in both lists."""
    forward_kl: Float[Tensor, " N"] | None
    """KL(teacher || student) over the full vocabulary."""
    reverse_kl: Float[Tensor, " N"] | None
    student_finite: Bool[Tensor, " N"]
    """All logits of the row are finite before the soft cap; where false, the row's values mean nothing."""
    teacher_finite: Bool[Tensor, " N"]


class Scan(NamedTuple):
    """Running sums of N positions over the part of the vocabulary seen so far; z are finished logits."""

    peak: Float[Tensor, " N"]
    """m = max z."""
    mass: Float[Tensor, " N"]
    """s = sum exp(z - m)."""
    weighted: Float[Tensor, " N"]
    """u = sum exp(z - m) (z - m)."""
    cross: Float[Tensor, " N"]
    """sum exp(z - m) (z' - m') with the other model's z', m'; stays 0 where no divergence is asked for."""
    topk_logits: Float[Tensor, "N K"]
    """Descending; ties broken by lower id."""
    topk_ids: Int[Tensor, "N K"]
    finite: Bool[Tensor, " N"]
    """Every logit so far was finite before the soft cap."""

    @property
    def logsumexp(self) -> Tensor:
        return self.peak + self.mass.log()

    @property
    def entropy(self) -> Tensor:
        """H = log s - u / s."""
        return self.mass.log() - self.weighted / self.mass


def start_scan(hidden: Float[Tensor, "N D"], k: int) -> Scan:
    """Running sums before the first column."""
    num_rows, device = hidden.shape[0], hidden.device
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # A finite start: rescaling by exp(lowest - peak) = 0 times a sum of 0 must not make a NaN.
    lowest = torch.finfo(dtype).min / 4
    return Scan(
        peak=torch.full((num_rows,), lowest, dtype=dtype, device=device),
        mass=torch.zeros(num_rows, dtype=dtype, device=device),
        weighted=torch.zeros(num_rows, dtype=dtype, device=device),
        cross=torch.zeros(num_rows, dtype=dtype, device=device),
        topk_logits=torch.full((num_rows, k), -torch.inf, dtype=dtype, device=device),
        topk_ids=torch.zeros((num_rows, k), dtype=torch.int64, device=device),
        finite=torch.ones(num_rows, dtype=torch.bool, device=device),
    )


def select_top(values: Float[Tensor, "N M"], k: int) -> Int[Tensor, "N K"]:
    """Columns of the k largest values of each row, descending, ties broken by lower column.

    `torch.topk` leaves the order of ties open. Two partial selections and a sort of K are five times as
    fast as one stable sort of 1,000 columns. Columns of a row with NaN are arbitrary but valid.
    """
    kth = values.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    column = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    tied = torch.where(values == kth, -column, -torch.inf)
    chosen = torch.where(values > kth, 1.0, tied).topk(k, dim=-1, sorted=False).indices
    chosen = chosen.sort(dim=-1).values
    order = values.gather(1, chosen).sort(dim=-1, descending=True, stable=True).indices
    return chosen.gather(1, order)


def logits_at(
    hidden: Float[Tensor, "N D"], head: Head, ids: Int[Tensor, "N W"], temperature: float
) -> Float[Tensor, "N W"]:
    """Finished logits of the given ids, float32 (float64 for float64 states)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    size = max(1, GATHER_ELEMENTS // max(1, ids.shape[1] * hidden.shape[1]))
    parts = []
    for start in range(0, max(1, hidden.shape[0]), size):
        rows = slice(start, start + size)
        weight = head.weight[ids[rows]].to(hidden.dtype).to(dtype)  # [n, W, D]
        with torch.autocast(hidden.device.type, enabled=False):
            raw = torch.bmm(weight, hidden[rows].to(dtype).unsqueeze(2)).squeeze(2)
        bias = None if head.bias is None else head.bias[ids[rows]].to(hidden.dtype).to(dtype)
        parts.append(raw if bias is None else raw + bias)
    return head.finish(torch.cat(parts), temperature)


def scores_from_scan(
    scan: Scan,
    hidden: Float[Tensor, "N D"],
    head: Head,
    target_ids: Int[Tensor, " N"],
    want_ids: Int[Tensor, "N W"] | None,
    temperature: float,
) -> TopKScores:
    """Turn the sums of a finished pass into log-probs and entropy."""
    normalizer = scan.logsumexp.unsqueeze(1)
    ids = target_ids.unsqueeze(1)
    ids = ids if want_ids is None else torch.cat([ids, want_ids], dim=1)
    asked = logits_at(hidden, head, ids, temperature) - normalizer
    return TopKScores(
        target_logprobs=asked[:, 0],
        topk_logprobs=scan.topk_logits - normalizer,
        topk_ids=scan.topk_ids,
        logsumexp=scan.logsumexp,
        entropy=scan.entropy,
        want_logprobs=None if want_ids is None else asked[:, 1:],
    )


def divergence_from_scan(scan: Scan, other: Scan) -> Float[Tensor, " N"]:
    """KL(p || p') over the vocabulary, where `scan` (of p) holds the cross sum with p'; nats, >= 0.

    KL = (u / s - log s) - (cross / s - log s')
    """
    own = scan.weighted / scan.mass - scan.mass.log()
    return (own - (scan.cross / scan.mass - other.mass.log())).clamp_min(0.0)


def disagreement(
    student_logprobs: Float[Tensor, "N U"], teacher_logprobs: Float[Tensor, "N U"]
) -> Float[Tensor, " N"]:
    """D = KL(p_T || p_S), both renormalized over the given ids; -inf in both marks an id that does not count.

    Source: eq. 3 and 9. In nats, >= 0.
    """
    student = student_logprobs - student_logprobs.logsumexp(-1, keepdim=True)
    teacher = teacher_logprobs - teacher_logprobs.logsumexp(-1, keepdim=True)
    gap = torch.where(teacher == -torch.inf, 0.0, teacher - student)
    return (teacher.exp() * gap).sum(-1).clamp_min(0.0)


def bhattacharyya(
    student_logprobs: Float[Tensor, "N U"], teacher_logprobs: Float[Tensor, "N U"]
) -> Float[Tensor, " N"]:
    """Sum over the given ids of sqrt(p_S p_T), both renormalized there; in [0, 1]."""
    student = student_logprobs - student_logprobs.logsumexp(-1, keepdim=True)
    teacher = teacher_logprobs - teacher_logprobs.logsumexp(-1, keepdim=True)
    return (0.5 * (student + teacher)).exp().sum(-1).clamp(0.0, 1.0)


def compare(
    student: TopKScores,
    teacher: TopKScores,
    *,
    student_finite: Bool[Tensor, " N"],
    teacher_finite: Bool[Tensor, " N"],
    forward_kl: Float[Tensor, " N"] | None = None,
    reverse_kl: Float[Tensor, " N"] | None = None,
) -> PairScores:
    """D on the union of supports, C and their relatives, from two scores that hold each other's ids."""
    assert student.want_logprobs is not None and teacher.want_logprobs is not None
    # [N, the teacher's, the student's]
    same = teacher.topk_ids.unsqueeze(2) == student.topk_ids.unsqueeze(1)
    repeated = same.any(2)  # counted once, as the student's entry
    at_teacher = student.want_logprobs.masked_fill(repeated, -torch.inf)
    own_teacher = teacher.topk_logprobs.masked_fill(repeated, -torch.inf)
    student_on_union = torch.cat([student.topk_logprobs, at_teacher], dim=1)
    teacher_on_union = torch.cat([teacher.want_logprobs, own_teacher], dim=1)
    teacher_mass = teacher.want_logprobs.exp()
    return PairScores(
        student=student,
        teacher=teacher,
        disagreement=disagreement(student_on_union, teacher_on_union),
        reverse_disagreement=disagreement(teacher_on_union, student_on_union),
        bhattacharyya=bhattacharyya(student_on_union, teacher_on_union),
        compatibility=teacher_mass.sum(-1).clamp(0.0, 1.0),
        compatibility_bound=(teacher_mass * same.any(1)).sum(-1).clamp(0.0, 1.0),
        num_shared=repeated.sum(-1).to(teacher_mass.dtype),
        forward_kl=forward_kl,
        reverse_kl=reverse_kl,
        student_finite=student_finite,
        teacher_finite=teacher_finite,
    )


def pair_from_scans(
    student_scan: Scan,
    teacher_scan: Scan,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    target_ids: Int[Tensor, " N"],
    temperature: float,
    *,
    full_kl: bool,
) -> PairScores:
    """Each model's log-probs at the other's ids, then D, C and, from the cross sums, the divergences."""
    return compare(
        scores_from_scan(student_scan, *student, target_ids, teacher_scan.topk_ids, temperature),
        scores_from_scan(teacher_scan, *teacher, target_ids, student_scan.topk_ids, temperature),
        student_finite=student_scan.finite,
        teacher_finite=teacher_scan.finite,
        forward_kl=divergence_from_scan(teacher_scan, student_scan) if full_kl else None,
        reverse_kl=divergence_from_scan(student_scan, teacher_scan) if full_kl else None,
    )
