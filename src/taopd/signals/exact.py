"""`signals="exact"`: the paper's definitions, from both models' true probabilities.

D needs p_S at the teacher's top-K ids and p_T at the student's, C needs p_T at the student's ids, H the
whole vocabulary. `kernels.pair_score` computes all of it from hidden states and heads without a
[positions, vocabulary] tensor; here the rows are checked, and the numbers named.

Why not two top-K lists as in the released code: an id that is missing from a list counts as probability 0
there, and each unit of teacher mass off the student's list then adds 20 to 28 nats to D. `topk_lists.py` has
that arithmetic, under its own name.

Source: arXiv 2605.26844, eq. 3, 4, 9, 10, 14.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head, PairScores, TopKScores, compare, pair_from_logprobs, pair_score
from taopd.kernels.scores import logits_at
from taopd.signals.merge_stops import merge_stop_class, scan_width
from taopd.signals.types import TokenSignals


def signals_from_pair(pair: PairScores, token_ids: Int[Tensor, " N"]) -> TokenSignals:
    """Name what both models' scores say about each position, where `token_ids` were sampled."""
    k = pair.student.topk_ids.shape[1]
    # A list that was asked for may be shorter than K.
    num_listed = (pair.teacher.topk_ids >= 0).sum(1)
    return TokenSignals(
        disagreement=pair.disagreement,
        compatibility=pair.compatibility,
        entropy=pair.student.entropy,
        teacher_entropy=pair.teacher.entropy,
        reverse_disagreement=pair.reverse_disagreement,
        bhattacharyya=pair.bhattacharyya,
        overlap=pair.num_shared / k,
        jaccard=pair.num_shared / (k + num_listed - pair.num_shared),
        compatibility_is_exact=True,
        student_topk_ids=pair.student.topk_ids,
        student_topk_logprobs=pair.student.topk_logprobs,
        teacher_topk_ids=pair.teacher.topk_ids,
        teacher_topk_logprobs=pair.teacher.topk_logprobs,
        student_logprobs=pair.student.target_logprobs,
        teacher_logprobs=pair.teacher.target_logprobs,
        forward_kl=pair.forward_kl,
        reverse_kl=pair.reverse_kl,
        compatibility_bound=pair.compatibility_bound,
        token_ids=token_ids,
        student_at_teacher_ids=pair.student.want_logprobs,
        teacher_at_student_ids=pair.teacher.want_logprobs,
    )


def signals_from_answer(
    student: TopKScores,
    token_ids: Int[Tensor, " N"],
    *,
    target_logprobs: Float[Tensor, " N"],
    topk_ids: Int[Tensor, "N K"],
    topk_logprobs: Float[Tensor, "N K"],
    want_logprobs: Float[Tensor, "N K"],
) -> TokenSignals:
    """Exact signals where the teacher was asked: all but those over its full distribution, which are None.

    Args:
        student: finite, with log-probs at the teacher's list as `want_logprobs`.
        target_logprobs: the teacher's, like all that follows; `want_logprobs` are at the student's list.
    """
    unsent = torch.zeros_like(target_logprobs)
    teacher = TopKScores(
        target_logprobs=target_logprobs,
        topk_logprobs=topk_logprobs,
        topk_ids=topk_ids,
        logsumexp=unsent,
        entropy=unsent,
        want_logprobs=want_logprobs,
    )
    finite = torch.ones_like(token_ids, dtype=torch.bool)
    pair = compare(student, teacher, student_finite=finite, teacher_finite=finite)
    return replace(signals_from_pair(pair, token_ids), teacher_entropy=None)


def signals_from_logprobs(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    full_kl: bool = False,
    stop_ids: Sequence[int] = (),
) -> TokenSignals:
    """Every exact signal from two full rows of log-probs: the definition.

    Args:
        full_kl: also compute both KL divergences over the full vocabulary.
        stop_ids: ids that count as one token, see `merge_stop_class`.
    """
    wide = scan_width(k, stop_ids, student_logprobs.shape[1])
    pair = pair_from_logprobs(
        student_logprobs, teacher_logprobs, target_ids, k=wide, full_kl=full_kl
    )
    if stop_ids:
        columns = torch.tensor(stop_ids, device=target_ids.device)
        stops = student_logprobs[:, columns], teacher_logprobs[:, columns]
        pair, target_ids = merge_stop_class(pair, *stops, target_ids, stop_ids=stop_ids, k=k)
    return signals_from_pair(pair, target_ids)


@torch.no_grad()
def exact_signals(
    student_hidden: Float[Tensor, "N Ds"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "_ Dt"],
    teacher_head: Head,
    target_ids: Int[Tensor, " _"],
    *,
    k: int = 16,
    temperature: float = 1.0,
    full_kl: bool = False,
    stop_ids: Sequence[int] = (),
    impl: str = "auto",
    locate: Callable[[int], str] = "row {}".format,
) -> TokenSignals:
    """Exact signals of N positions from hidden states and heads, in bounded memory.

    Args:
        target_ids: the sampled tokens.
        temperature: divides the logits of both models.
        stop_ids: ids that count as one token, see `merge_stop_class`.
        impl: which kernel; see `kernels.topk_score`.
        locate: turns a row number into words for an error message.

    Raises:
        ConfigError: if k exceeds the shared vocabulary, or the kernel asked for cannot run.
        ShapeError: if the heads' vocabularies differ or the hidden states' lengths do.
        NumericsError: on NaN or infinite logits; names the model and the row.
    """
    pair = pair_score(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        target_ids,
        k=scan_width(k, stop_ids, student_head.weight.shape[0]),
        temperature=temperature,
        full_kl=full_kl,
        impl=impl,
    )
    for name, finite in (("student", pair.student_finite), ("teacher", pair.teacher_finite)):
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise NumericsError(
                f"the {name}'s logits are NaN or infinite at {locate(row)}; check its weights, dtype and "
                "learning rate",
                index=row,
            )
    if stop_ids:
        ids = target_ids.new_tensor(stop_ids).expand(len(target_ids), -1)
        student_stops = logits_at(student_hidden, student_head, ids, temperature)
        student_stops = student_stops - pair.student.logsumexp.unsqueeze(1)
        teacher_stops = logits_at(teacher_hidden, teacher_head, ids, temperature)
        teacher_stops = teacher_stops - pair.teacher.logsumexp.unsqueeze(1)
        pair, target_ids = merge_stop_class(
            pair, student_stops, teacher_stops, target_ids, stop_ids=stop_ids, k=k
        )
    return signals_from_pair(pair, target_ids)
