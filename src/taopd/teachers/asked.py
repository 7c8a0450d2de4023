"""Scoring a generation batch with a teacher that is asked: the student here, the teacher anywhere.

Micro-batch by micro-batch the student runs first, since its top-K are the wanted ids; the teacher scores
a micro-batch while the student runs on the next one. Where the teacher gives wanted ids the signals are
the exact ones, but for those that read its full distribution; else they are those of two top-K lists, with
the lower bound of C. A batch is one or the other: bounds and exact values never share a normalization.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head, TopKScores, compare, topk_score
from taopd.scoring import Forward, Positions, Reuse, Scored, micro_batches, states_at
from taopd.signals import (
    TokenSignals,
    concatenate,
    lists_from_exact,
    signals_from_pair,
    topk_lists_signals,
)
from taopd.teachers.protocol import Teacher, TeacherScores


def ask_positions(
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
    """Signals of the given positions of a padded batch, the teacher asked for its part.

    Args:
        vocab_size: ids that both models share.
        when: opens the message of an error about NaN or infinite logits.
        reuse: what the loss will take from the student's pass; default nothing.

    Raises:
        TeacherError, TeacherUnavailable: see `Teacher.score`.
        NumericsError: on NaN or infinite logits of the student.
    """
    reuse = Reuse() if reuse is None else reuse
    asked: list[tuple[TopKScores, Tensor, Head, Future[TeacherScores]]] = []
    states = states_at(
        reuse.student_forward or forward,
        student,
        batch,
        positions,
        micro_batch_size,
        with_graph=reuse.keep_student_graph,
        first_column=reuse.first_column,
    )
    hiddens = []
    with ThreadPoolExecutor() as threads:
        for (rows, mask), (hidden, head) in zip(
            micro_batches(positions, micro_batch_size), states, strict=True
        ):
            targets = batch["completion_ids"][rows][mask]
            own = topk_score(hidden.detach(), head, targets, k=k)
            _check_finite(own, Positions.of(mask), rows.start, when)
            part = {name: value[rows] for name, value in _sequences(batch).items()}
            answer = threads.submit(_ask, teacher, part, mask, own.topk_ids, k)
            asked.append((own, hidden, head, answer))
            hiddens.append(hidden)
        answers = [answer.result() for *_, answer in asked]
    exact = all(answer.exact for answer in answers)
    signals = [
        _signals(
            own, hidden.detach(), head, _shared(answer, vocab_size, hidden.device), mask_ids, exact
        )
        for (own, hidden, head, _), answer, mask_ids in zip(
            asked, answers, _targets(batch, positions, micro_batch_size), strict=True
        )
    ]
    with torch.set_grad_enabled(reuse.keep_student_graph):
        kept = torch.cat(hiddens) if reuse.keep_student_graph else None
    return Scored(signals=concatenate(signals), teacher_hidden=None, student_hidden=kept)


def as_bound(signals: TokenSignals) -> TokenSignals:
    """What two lists and the lower bound say, of signals that may be exact: for ranks that got less."""
    lists = lists_from_exact(signals)
    assert lists.compatibility_bound is not None
    return replace(
        lists,
        compatibility=lists.compatibility_bound,
        compatibility_is_exact=False,
        teacher_at_student_ids=None,
    )


def _sequences(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: batch[name]
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    }


def _targets(batch: Mapping[str, Tensor], positions: Positions, size: int) -> list[Tensor]:
    return [batch["completion_ids"][rows][mask] for rows, mask in micro_batches(positions, size)]


def _ask(
    teacher: Teacher, part: Mapping[str, Tensor], mask: Bool[Tensor, "b T"], want: Tensor, k: int
) -> TeacherScores:
    """The teacher's scores at `mask`; it scores every token of the completions up to the last one."""
    keep = mask.any(1)
    # A row without a position of ours is not asked for; tokens skipped inside a row are scored with it.
    tokens, starts, places = [], [], []
    for row in keep.nonzero().flatten().tolist():
        prompt = part["prompt_ids"][row][part["prompt_mask"][row].bool()]
        inside = part["completion_mask"][row].bool()
        length = int(mask[row].nonzero().max()) + 1
        completion = part["completion_ids"][row, :length][inside[:length]]
        tokens.append([*prompt.tolist(), *completion.tolist()])
        starts.append(len(prompt))
        places.append(mask[row, :length][inside[:length]])
    if not tokens:
        empty = want.new_zeros(0)
        return TeacherScores(
            logprobs=empty.float(),
            topk_ids=want[:0],
            topk_logprobs=want[:0].float(),
            want_logprobs=want[:0].float(),
        )
    chosen = torch.cat(places)
    wanted = want.new_zeros(len(chosen), want.shape[1])
    wanted[chosen] = want
    scores = teacher.score(tokens, starts, wanted, k)
    chosen = chosen.to(scores.logprobs.device)
    return TeacherScores(
        logprobs=scores.logprobs[chosen],
        topk_ids=scores.topk_ids[chosen],
        topk_logprobs=scores.topk_logprobs[chosen],
        want_logprobs=None if scores.want_logprobs is None else scores.want_logprobs[chosen],
    )


def _shared(scores: TeacherScores, vocab_size: int, device: torch.device) -> TeacherScores:
    """Lists without ids that the student lacks, shorter where one was among them; on the student's device."""
    foreign = scores.topk_ids >= vocab_size
    logprobs = scores.topk_logprobs.masked_fill(foreign, -torch.inf)
    order = (
        (scores.topk_ids.masked_fill(foreign, -1) < 0).to(torch.int8).argsort(dim=1, stable=True)
    )
    ids = scores.topk_ids.masked_fill(foreign, -1).gather(1, order)
    want = scores.want_logprobs
    return TeacherScores(
        logprobs=scores.logprobs.to(device),
        topk_ids=ids.to(device),
        topk_logprobs=logprobs.gather(1, order).to(device),
        want_logprobs=None if want is None else want.to(device),
    )


def _signals(
    own: TopKScores,
    hidden: Tensor,
    head: Head,
    teacher: TeacherScores,
    targets: Int[Tensor, " n"],
    exact: bool,
) -> TokenSignals:
    if not exact:
        lists = topk_lists_signals(
            own.topk_ids,
            own.topk_logprobs,
            teacher.topk_ids,
            teacher.topk_logprobs,
            k=own.topk_ids.shape[1],
        )
        return replace(
            lists,
            token_ids=targets,
            student_logprobs=own.target_logprobs,
            teacher_logprobs=teacher.logprobs,
        )
    missing = teacher.topk_ids < 0
    asked = topk_score(
        hidden, head, targets, k=1, want_ids=teacher.topk_ids.clamp_min(0)
    ).want_logprobs
    assert asked is not None
    finite = torch.ones_like(targets, dtype=torch.bool)
    pair = compare(
        own._replace(want_logprobs=asked.masked_fill(missing, -torch.inf)),
        TopKScores(
            target_logprobs=teacher.logprobs,
            topk_logprobs=teacher.topk_logprobs,
            topk_ids=teacher.topk_ids,
            logsumexp=torch.zeros_like(teacher.logprobs),
            entropy=torch.zeros_like(teacher.logprobs),
            want_logprobs=teacher.want_logprobs,
        ),
        student_finite=finite,
        teacher_finite=finite,
    )
    # The teacher's entropy is over a distribution that nobody sent.
    return replace(signals_from_pair(pair, targets), teacher_entropy=None)


def _check_finite(own: TopKScores, positions: Positions, first_row: int, when: str) -> None:
    wrong = ~torch.isfinite(own.logsumexp)
    if bool(wrong.any()):
        where = positions.describe(int(wrong.nonzero()[0]), first_row=first_row, when=when)
        raise NumericsError(
            f"the student's logits are NaN or infinite at {where}; check its weights, dtype and learning rate"
        )
