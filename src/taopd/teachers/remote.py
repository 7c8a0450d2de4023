"""Scoring of a generation batch with a local student and a remote teacher.

Micro-batch by micro-batch the student runs first, since its top-K are the wanted ids; the teacher scores
a micro-batch while the student runs on the next one. Where the teacher gives wanted ids the signals are
the exact ones, but for those that read its full distribution; else they are those of two top-K lists, with
the lower bound of C. A batch is one or the other: bounds and exact values never share a normalization.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head, TopKScores, topk_score
from taopd.models.batch import (
    SEQUENCE,
    Forward,
    Positions,
    micro_batches,
    teacher_side,
    unpadded,
)
from taopd.models.scoring import Reuse, Scored
from taopd.signals import (
    TokenSignals,
    concatenate,
    lists_from_exact,
    signals_from_answer,
    taken,
    topk_lists_signals,
)
from taopd.teachers.protocol import Teacher, TeacherScores


def score_remote(
    forward: Forward,
    student,
    teacher: Teacher,
    batch: Mapping[str, Tensor],
    positions: Positions,
    *,
    micro_batch_size: int,
    vocab_size: int,
    k: int,
    when: str,
    reuse: Reuse | None = None,
) -> Scored:
    """Signals of the given positions of a padded batch, with the scores of a remote teacher.

    Args:
        batch: see `scoring.score_positions`.
        vocab_size: ids that both models share.
        when: opens the message of an error about NaN or infinite logits.
        reuse: what the loss will take from the student's pass; default nothing.

    Raises:
        TeacherError, TeacherUnavailable: see `Teacher.score`.
        NumericsError: on NaN or infinite logits of the student.
    """
    reuse = Reuse() if reuse is None else reuse
    side = teacher_side(batch)
    parts, problem = [], None
    for rows, mask in micro_batches(positions, micro_batch_size):
        hidden, head = reuse.student_states(forward, student, batch, rows, mask)
        targets = batch["completion_ids"][rows][mask]
        scores = topk_score(hidden.detach(), head, targets, k=k)
        try:
            _check_finite(scores, Positions.of(mask), rows.start, when)
        except NumericsError as error:
            # Raised after the loop, as in `score_positions`: other processes are in the same forwards.
            problem = problem or error
            continue
        sequences = {name: side[name][rows] for name in SEQUENCE}
        answer = _in_background(_question(teacher, sequences, mask, scores.topk_ids, k))
        parts.append(
            _Part(student=scores, hidden=hidden, head=head, targets=targets, answer=answer)
        )
    if problem is not None:
        raise problem
    answers = [_shared(part.answer.result(), vocab_size, part.hidden.device) for part in parts]
    exact = all(answer.exact for answer in answers)
    signals = [_signals(part, answer, exact) for part, answer in zip(parts, answers, strict=True)]
    with torch.set_grad_enabled(reuse.keep_student_graph):
        kept = torch.cat([part.hidden for part in parts]) if reuse.keep_student_graph else None
    return Scored(signals=concatenate(signals), teacher_hidden=None, student_hidden=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A micro-batch of n positions that the student has scored and the teacher is scoring."""

    student: TopKScores
    hidden: Float[Tensor, "n D"]
    head: Head
    targets: Int[Tensor, " n"]
    answer: Future[TeacherScores]


def as_bound(signals: TokenSignals) -> TokenSignals:
    """Signals reduced to top-K lists and the lower bound of C, where another rank has no exact ones."""
    lists = lists_from_exact(signals)
    assert lists.compatibility_bound is not None
    return replace(
        lists,
        compatibility=lists.compatibility_bound,
        compatibility_is_exact=False,
        teacher_at_student_ids=None,
    )


def _in_background(call: Callable[[], TeacherScores]) -> Future[TeacherScores]:
    """A call in a daemon thread, so that an interrupted run does not wait for a server."""
    future: Future[TeacherScores] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="teacher-score", daemon=True).start()
    return future


def _question(
    teacher: Teacher,
    batch: Mapping[str, Tensor],
    mask: Bool[Tensor, "b T"],
    want: Int[Tensor, "n K"],
    k: int,
) -> Callable[[], TeacherScores]:
    """The request for the scores at `mask`: every completion up to its last position there.

    Rows without such a position are not asked for; tokens skipped inside a row are scored with it.
    """
    tokens, starts, masks = [], [], []
    for row in mask.any(1).nonzero().flatten().tolist():
        prompt = unpadded(batch, "prompt", row)
        length = int(mask[row].nonzero().max()) + 1
        inside = batch["completion_mask"][row, :length].bool()
        completion = batch["completion_ids"][row, :length][inside]
        tokens.append([*prompt, *completion.tolist()])
        starts.append(len(prompt))
        masks.append(mask[row, :length][inside])
    if not tokens:
        return lambda: TeacherScores(
            logprobs=torch.zeros(0),
            topk_ids=torch.zeros(0, k, dtype=torch.long),
            topk_logprobs=torch.zeros(0, k),
            want_logprobs=torch.zeros(0, k),
        )
    chosen = torch.cat(masks)
    # A skipped token's first wanted ids are as good as any: what is scored there is dropped.
    wanted = want[:1].expand(len(chosen), -1).clone()
    wanted[chosen] = want

    def ask() -> TeacherScores:
        scores = teacher.score(tokens, starts, wanted, k)
        return taken(scores, chosen.to(scores.logprobs.device))

    return ask


def _shared(scores: TeacherScores, vocab_size: int, device: torch.device) -> TeacherScores:
    """Scores without ids that the student lacks, on the student's device; such lists get shorter."""
    ids = scores.topk_ids.masked_fill(scores.topk_ids >= vocab_size, -1)
    order = (ids < 0).to(torch.int8).argsort(dim=1, stable=True)
    logprobs = scores.topk_logprobs.masked_fill(ids < 0, -torch.inf)
    want = scores.want_logprobs
    return TeacherScores(
        logprobs=scores.logprobs.to(device),
        topk_ids=ids.gather(1, order).to(device),
        topk_logprobs=logprobs.gather(1, order).to(device),
        want_logprobs=None if want is None else want.to(device),
    )


def _signals(part: _Part, teacher: TeacherScores, exact: bool) -> TokenSignals:
    student, k = part.student, part.student.topk_ids.shape[1]
    if not exact:
        lists = topk_lists_signals(
            student.topk_ids, student.topk_logprobs, teacher.topk_ids, teacher.topk_logprobs, k=k
        )
        return replace(
            lists,
            token_ids=part.targets,
            student_logprobs=student.target_logprobs,
            teacher_logprobs=teacher.logprobs,
            full_entropy=student.entropy,
        )
    missing = teacher.topk_ids < 0
    ids = teacher.topk_ids.clamp_min(0)
    rescored = topk_score(part.hidden.detach(), part.head, part.targets, k=1, want_ids=ids)
    assert rescored.want_logprobs is not None
    assert teacher.want_logprobs is not None
    return signals_from_answer(
        student._replace(want_logprobs=rescored.want_logprobs.masked_fill(missing, -torch.inf)),
        part.targets,
        target_logprobs=teacher.logprobs,
        topk_ids=teacher.topk_ids,
        topk_logprobs=teacher.topk_logprobs,
        want_logprobs=teacher.want_logprobs,
    )


def _check_finite(student: TopKScores, positions: Positions, first_row: int, when: str) -> None:
    wrong = ~torch.isfinite(student.logsumexp)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        where = positions.describe(index, first_row=first_row, when=when)
        completion, position = positions.place(index, first_row=first_row)
        raise NumericsError(
            f"the student's logits are NaN or infinite at {where}; check its weights, dtype and learning "
            "rate",
            completion=completion,
            position=position,
        )
