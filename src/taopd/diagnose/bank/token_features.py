"""Features of every token of a bank, for all K from one projection of the vocabulary.

Every feature is a reduction of one row of log-probs per model. Entropies, divergences and ranks do not depend
on K and are computed once. The supports of every K are prefixes of one top-K list, so a further K costs one
gather and no pass over the vocabulary.

`taopd.signals.signals_from_logprobs` is the definition for one K; a test holds the two equal.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import TopKScores, positions_per_chunk
from taopd.losses import forward_kl, reverse_kl
from taopd.models.forward import State
from taopd.selectors import normalized_view
from taopd.signals import SignalTable, signals_from_answer

BANK_TOP_K = (8, 16, 32)
"""The published K. [arXiv 2605.26844]"""
FEATURES = (
    "entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "student_logprob",
    "teacher_logprob",
    "student_rank",
    "teacher_rank",
)
"""Columns that do not depend on K. Nats; ranks of the sampled token are 1-based."""
SUPPORT_FEATURES = {
    "disagreement": "disagreement",
    "compatibility": "compatibility",
    "bound": "compatibility_bound",
    "overlap": "overlap",
    "jaccard": "jaccard",
    "bc": "bhattacharyya",
}
"""Columns per K, named `<feature>_k<K>`, and their signals; `quadrant_k<K>` is of the whole bank."""


def chunked_logprobs(
    student_states: Iterable[State],
    teacher_states: Iterable[State],
    *,
    temperature: float,
    locate: Callable[[int], str],
    tolerate_student: bool = False,
) -> Iterator[tuple[slice, Float[Tensor, "n V"], Float[Tensor, "n V"]]]:
    """Chunks of both models' log-probs with their rows, float64; one chunk is in memory at a time.

    In float32 a divergence of sure models is rounding: below 0 as often as above, and its share of nothing.

    Args:
        locate: turns a row number into words for an error message.
        tolerate_student: let NaN of the student through, for a caller who counts them.

    Raises:
        NumericsError: on NaN or infinite logits; names the model and the position.
    """
    offset = 0
    for (student, student_head), (teacher, teacher_head) in zip(
        student_states, teacher_states, strict=True
    ):
        student_head = student_head.cast(student.dtype)
        teacher_head = teacher_head.cast(teacher.dtype)
        # Of twice the room that float32 takes.
        size = positions_per_chunk(2 * student_head.vocab_size)
        for start in range(0, student.shape[0], size):
            rows = slice(start, min(start + size, student.shape[0]))
            logprobs = []
            for name, hidden, head in (
                ("student", student[rows], student_head),
                ("teacher", teacher[rows], teacher_head),
            ):
                logits = head.project(hidden)
                finite = logits.sum(-1).isfinite()
                if not bool(finite.all()) and not (tolerate_student and name == "student"):
                    row = offset + start + int((~finite).nonzero()[0])
                    raise NumericsError(
                        f"the {name}'s logits are NaN or infinite at {locate(row)}; check its "
                        "weights and dtype"
                    )
                logits = head.finish(logits, temperature)
                if logits.device.type != "mps":  # It has no float64.
                    logits = logits.double()
                logprobs.append(logits.log_softmax(-1))
                del logits  # or it would stay alive beside the log-probs of the other model
            yield slice(offset + rows.start, offset + rows.stop), logprobs[0], logprobs[1]
            del logprobs
        offset += student.shape[0]


def features_from_logprobs(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"],
    target_ids: Int[Tensor, " n"],
    *,
    ks: Sequence[int],
) -> tuple[dict[str, Tensor], tuple[Int[Tensor, "n K"], Float[Tensor, "n K"]]]:
    """Every feature of n positions by column name, and the teacher's top max(K) (ids, log-probs)."""
    target = target_ids.unsqueeze(1)
    columns: dict[str, Tensor] = {
        "entropy": _entropy(student),
        "teacher_entropy": _entropy(teacher),
        "forward_kl": forward_kl(student, teacher),
        "reverse_kl": reverse_kl(student, teacher),
    }
    for name, logprobs in (("student", student), ("teacher", teacher)):
        sampled = logprobs.gather(1, target)
        columns[f"{name}_logprob"] = sampled.squeeze(1)
        columns[f"{name}_rank"] = (logprobs > sampled).sum(-1) + 1
    student_best, teacher_best = (side.topk(max(ks), dim=-1) for side in (student, teacher))
    for k in ks:
        ids, teacher_ids = student_best.indices[:, :k], teacher_best.indices[:, :k]
        own = TopKScores(
            target_logprobs=columns["student_logprob"],
            topk_logprobs=student_best.values[:, :k],
            topk_ids=ids,
            logsumexp=torch.zeros_like(columns["entropy"]),  # nothing reads it
            entropy=columns["entropy"],
            want_logprobs=student.gather(1, teacher_ids),
        )
        signals = signals_from_answer(
            own,
            target_ids,
            target_logprobs=columns["teacher_logprob"],
            topk_ids=teacher_ids,
            topk_logprobs=teacher_best.values[:, :k],
            want_logprobs=teacher.gather(1, ids),
        )
        columns |= {f"{f}_k{k}": getattr(signals, signal) for f, signal in SUPPORT_FEATURES.items()}
    return columns, (teacher_best.indices, teacher_best.values)


def _entropy(logprobs: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    return -(logprobs.exp() * logprobs).sum(-1)


def quadrant_columns(
    columns: Mapping[str, Any], completion: Tensor, position: Tensor, ks: Sequence[int]
) -> dict[str, Tensor]:
    """`quadrant_k<K>` 1..4 by the medians of H~ and D~ over the full bank, as the selectors compute it."""
    quadrants = {}
    for k in ks:
        table = SignalTable(
            disagreement=columns[f"disagreement_k{k}"].double(),
            compatibility=columns[f"compatibility_k{k}"].double(),
            entropy=columns["entropy"].double(),
            completion=completion,
            position=position,
            valid=torch.ones_like(completion, dtype=torch.bool),
        )
        quadrants[f"quadrant_k{k}"] = normalized_view(table).quadrant
    return quadrants


def collect_features(
    chunks: Iterable[tuple[slice, Tensor, Tensor]],
    target_ids: Int[Tensor, " N"],
    *,
    ks: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features of all positions on the CPU, and the teacher's top-K ids (int32) and log-probs.

    Args:
        progress: called with (positions done, positions in all).
    """
    num_tokens, width = target_ids.shape[0], max(ks)
    # Filled in place: with a list of every chunk's small results the process reached 14.8 GiB on the way to
    # the published size, against 426 MiB above the models now. Most likely the small tensors that outlive
    # their chunk settle in the holes that large temporaries leave, so that the next ones no longer fit.
    columns: dict[str, Tensor] = {}
    ids = torch.empty((num_tokens, width), dtype=torch.int32)
    logprobs = torch.empty((num_tokens, width), dtype=torch.float32)
    for rows, student, teacher in chunks:
        values, best = features_from_logprobs(student, teacher, target_ids[rows], ks=ks)
        if not columns:
            columns = {
                name: torch.empty(num_tokens, dtype=part.dtype) for name, part in values.items()
            }
        for name, part in values.items():
            columns[name][rows] = part.cpu()
        ids[rows], logprobs[rows] = best[0].to("cpu", torch.int32), best[1].cpu().float()
        del values, best
        if progress is not None:
            progress(rows.stop, num_tokens)
    return columns, ids, logprobs
