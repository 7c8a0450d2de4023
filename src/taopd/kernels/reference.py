"""Scoring from the definition: whole rows of log-probs. What the other implementations must agree with.

Differentiable, and as precise as its input: `hidden.double()` with a float64 head gives the truth that
float32 results are judged by. Holds [N, V] several times; not for long batches.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.kernels.head import Head
from taopd.kernels.scores import PairScores, TopKScores, compare


def scores_from_logprobs(
    logprobs: Float[Tensor, "N V"],
    logsumexp: Float[Tensor, " N"],
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    want_ids: Int[Tensor, "N W"] | None = None,
) -> TopKScores:
    """The definition of every field of `TopKScores`, from full rows of log-probs."""
    top = logprobs.sort(dim=-1, descending=True, stable=True)
    probs = logprobs.exp()
    return TopKScores(
        target_logprobs=logprobs.gather(1, target_ids.unsqueeze(1)).squeeze(1),
        topk_logprobs=top.values[:, :k],
        topk_ids=top.indices[:, :k],
        logsumexp=logsumexp,
        entropy=-(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1),  # 0 log 0 = 0
        want_logprobs=None if want_ids is None else logprobs.gather(1, want_ids),
    )


def topk_score(
    hidden: Float[Tensor, "N D"],
    head: Head,
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    temperature: float = 1.0,
    want_ids: Int[Tensor, "N W"] | None = None,
) -> TopKScores:
    """log-softmax of finish(W h + b) / temperature, then sort, gather and sum; see `TopKScores`."""
    logits = head.finish(head.project(hidden), temperature)
    logprobs, logsumexp = logits.log_softmax(-1), logits.logsumexp(-1)
    return scores_from_logprobs(logprobs, logsumexp, target_ids, k=k, want_ids=want_ids)


def _divergence(own: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(own || other); an id that `own` masks adds nothing."""
    return (own.exp() * (own - other).masked_fill(own == -torch.inf, 0.0)).sum(-1)


def pair_from_logprobs(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    full_kl: bool = False,
) -> PairScores:
    """The definition of every field of `PairScores`, from two full rows of log-probs."""
    rows = student_logprobs, teacher_logprobs
    zero = student_logprobs.new_zeros(len(student_logprobs))  # log-probs are normalized
    lists = [scores_from_logprobs(row, zero, target_ids, k=k).topk_ids for row in rows]
    student, teacher = (
        scores_from_logprobs(row, row.logsumexp(-1), target_ids, k=k, want_ids=ids)
        for row, ids in zip(rows, reversed(lists), strict=True)
    )
    return compare(
        student,
        teacher,
        student_finite=student_logprobs.isfinite().all(-1),
        teacher_finite=teacher_logprobs.isfinite().all(-1),
        forward_kl=_divergence(teacher_logprobs, student_logprobs) if full_kl else None,
        reverse_kl=_divergence(student_logprobs, teacher_logprobs) if full_kl else None,
    )


def pair_score(
    student_hidden: Float[Tensor, "N Ds"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "N Dt"],
    teacher_head: Head,
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    temperature: float = 1.0,
    full_kl: bool = False,
) -> PairScores:
    """Both models' log-softmax, then `pair_from_logprobs`; see `PairScores`."""
    raw = [student_head.project(student_hidden), teacher_head.project(teacher_hidden)]
    logits = [
        head.finish(row, temperature)
        for head, row in zip((student_head, teacher_head), raw, strict=True)
    ]
    pair = pair_from_logprobs(
        logits[0].log_softmax(-1), logits[1].log_softmax(-1), target_ids, k=k, full_kl=full_kl
    )
    return pair._replace(
        student=pair.student._replace(logsumexp=logits[0].logsumexp(-1)),
        teacher=pair.teacher._replace(logsumexp=logits[1].logsumexp(-1)),
        student_finite=raw[0].isfinite().all(-1),
        teacher_finite=raw[1].isfinite().all(-1),
    )
