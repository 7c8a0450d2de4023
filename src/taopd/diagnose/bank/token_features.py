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
from taopd.kernels import CHUNK_ELEMENTS, bhattacharyya, disagreement, positions_per_chunk
from taopd.losses import forward_kl, reverse_kl
from taopd.models.forward import State
from taopd.selectors import normalized_view
from taopd.signals import SignalTable

BANK_TOP_K = (8, 16, 32)
"""The published K. [METHOD section 4]"""
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
SUPPORT_FEATURES = ("disagreement", "compatibility", "bound", "overlap", "jaccard", "bc")
"""Columns per K, named `<feature>_k<K>`; `quadrant_k<K>` comes from the whole bank."""


def chunked_logprobs(
    student_states: Iterable[State],
    teacher_states: Iterable[State],
    *,
    temperature: float,
    locate: Callable[[int], str],
    tolerate_student: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Iterator[tuple[slice, Float[Tensor, "n V"], Float[Tensor, "n V"]]]:
    """Chunks of both models' log-probs with their rows; one chunk is in memory at a time.

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
        student_head, teacher_head = (
            student_head.cast(student.dtype),
            teacher_head.cast(teacher.dtype),
        )
        size = positions_per_chunk(student_head.vocab_size, chunk_elements)
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
                logprobs.append(head.finish(logits, temperature).log_softmax(-1))
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
    student_ids = student.topk(max(ks), dim=-1).indices
    teacher_best = teacher.topk(max(ks), dim=-1)
    for k in ks:
        support = _support_features(
            student, teacher, student_ids[:, :k], teacher_best.indices[:, :k]
        )
        columns |= {f"{name}_k{k}": values for name, values in support.items()}
    return columns, (teacher_best.indices, teacher_best.values)


def _entropy(logprobs: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    return -(logprobs.exp() * logprobs).sum(-1)


def support_union(
    student_ids: Int[Tensor, "N K"], teacher_ids: Int[Tensor, "N K"]
) -> tuple[Int[Tensor, "N U"], Tensor]:
    """U = S_S united with S_T as [N, 2K] ids, and which entries count (a repeated id counts once)."""
    repeated = (teacher_ids.unsqueeze(2) == student_ids.unsqueeze(1)).any(-1)
    ids = torch.cat([student_ids, teacher_ids], dim=1)
    return ids, torch.cat([torch.ones_like(repeated), ~repeated], dim=1)


def _support_features(
    student: Tensor, teacher: Tensor, student_ids: Tensor, teacher_ids: Tensor
) -> dict[str, Tensor]:
    """The columns of one K, from both supports. [METHOD section 2]"""
    k = student_ids.shape[1]
    union, counts = support_union(student_ids, teacher_ids)
    student_on_union, teacher_on_union = (
        logprobs.gather(1, union).masked_fill(~counts, -torch.inf)
        for logprobs in (student, teacher)
    )
    shared = (2 * k - counts.sum(-1)).to(student.dtype)
    mass = teacher.gather(1, student_ids).exp()
    in_both = (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)).any(-1)
    return {
        "disagreement": disagreement(student_on_union, teacher_on_union),
        "compatibility": mass.sum(-1).clamp(0.0, 1.0),
        "bound": (mass * in_both).sum(-1).clamp(0.0, 1.0),
        "overlap": shared / k,
        "jaccard": shared / (2 * k - shared),
        "bc": bhattacharyya(student_on_union, teacher_on_union),
    }


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
            response=completion,
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
