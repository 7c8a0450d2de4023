"""What the student's logits and verl's teacher list say about each token; on the worker, plain tensors.

verl's teacher answers with its own top-K and nothing else. So the student's side is known everywhere, and the
teacher's on its list: two top-K lists always, the exact signals where the list holds the student's ids.

Source: `taopd.signals`; the alignment is verl's (position t of a sequence predicts token t + 1).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.kernels import TopKScores
from taopd.kernels.scores import select_top
from taopd.runs.signal_names import SELECTED_BY
from taopd.signals import TokenSignals, signals_from_answer, topk_lists_signals

PREFIX = "taopd_"
"""Of every column that the adapter adds to verl's batch."""
SIGNAL_COLUMNS = (*SELECTED_BY, "reverse_disagreement", "bhattacharyya", "overlap", "jaccard")
"""Fields of `TokenSignals` that travel to the controller."""
COLUMNS = (*SIGNAL_COLUMNS, "student_logprobs", "teacher_logprobs", "covered")
BLOCK_ROWS = 1024
"""Tokens whose log-probs over the vocabulary are held at a time."""


@torch.no_grad()
def signal_columns(
    logits: Float[Tensor, "N V"],
    teacher_ids: Int[Tensor, "N L"],
    teacher_logprobs: Float[Tensor, "N L"],
    next_ids: Int[Tensor, " N"],
    *,
    k: int,
    exact: bool,
) -> dict[str, Float[Tensor, " N"]]:
    """Columns of N positions, float64, named as in `COLUMNS` with the prefix.

    `covered` is 1 where the teacher's list holds all K of the student's ids; exact signals mean nothing
    elsewhere. `teacher_logprobs` is -inf where the list does not hold the next token.

    Args:
        logits: the student's, already divided by its temperature.
        teacher_ids: best first, L >= k.
        next_ids: the token that each position predicts.
        exact: the paper's D, C and H; else those of the two lists of length k.
    """
    starts = range(0, max(1, len(logits)), BLOCK_ROWS)
    blocks = [
        _block(logits[rows], teacher_ids[rows], teacher_logprobs[rows], next_ids[rows], k, exact)
        for rows in (slice(start, start + BLOCK_ROWS) for start in starts)
    ]
    return {
        PREFIX + name: torch.cat([block[name] for block in blocks]).double() for name in COLUMNS
    }


def _block(
    logits: Tensor, ids: Tensor, logprobs: Tensor, next_ids: Tensor, k: int, exact: bool
) -> dict[str, Tensor]:
    ids, logprobs = ids.long(), logprobs.float()
    student = logits.float().log_softmax(-1)
    own_ids = select_top(student, k)
    own_logprobs = student.gather(1, own_ids)
    at_own, found = teacher_at(ids, logprobs, own_ids)
    of_next, _ = teacher_at(ids, logprobs, next_ids.unsqueeze(1))
    of_next = of_next.squeeze(1)
    student_next = student.gather(1, next_ids.unsqueeze(1)).squeeze(1)
    ids, logprobs = ids[:, :k], logprobs[:, :k]
    if exact:
        entropy = torch.special.entr(student.exp()).sum(-1)
        own = TopKScores(
            target_logprobs=student_next,
            topk_logprobs=own_logprobs,
            topk_ids=own_ids,
            logsumexp=torch.zeros_like(entropy),  # nothing reads it
            entropy=entropy,
            want_logprobs=student.gather(1, ids),
        )
        signals: TokenSignals = signals_from_answer(
            own,
            next_ids,
            target_logprobs=of_next,
            topk_ids=ids,
            topk_logprobs=logprobs,
            want_logprobs=at_own,
        )
    else:
        signals = topk_lists_signals(own_ids, own_logprobs, ids, logprobs, k=k)
    columns = {name: getattr(signals, name) for name in SIGNAL_COLUMNS}
    return columns | {
        "student_logprobs": student_next,
        "teacher_logprobs": of_next,
        "covered": found.all(1),
    }


def teacher_at(
    ids: Int[Tensor, "N L"], logprobs: Float[Tensor, "N L"], wanted: Int[Tensor, "N W"]
) -> tuple[Float[Tensor, "N W"], Bool[Tensor, "N W"]]:
    """The list's log-probs of the wanted ids, -inf where it does not hold them; and where it does."""
    same = wanted.unsqueeze(2) == ids.unsqueeze(1)  # [N, W, L]
    values = torch.where(same, logprobs.unsqueeze(1), -torch.inf).amax(2)
    return values, same.any(2)
