"""`signals="exact"`: the paper's definitions, from both models' true probabilities.

D needs p_S at the teacher's top-K ids and p_T at the student's, C needs p_T at the student's ids, H the
whole vocabulary. All of it is a reduction of one row of logits, so positions are projected in chunks and
no [positions, vocabulary] tensor outlives its chunk; memory does not grow with positions x vocabulary.

Why not two top-K lists as in the released code: an id that is missing from a list counts as probability 0
there, and each unit of teacher mass off the student's list then adds 20 to 28 nats to D. `lists.py` has
that arithmetic, under its own name.

Source: arXiv 2605.26844, eq. 3, 4, 9, 10, 14.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.kernels import CHUNK_ELEMENTS, Head, positions_per_chunk
from taopd.signals.tables import TokenSignals


def support_union(
    student_ids: Int[Tensor, "N K"], teacher_ids: Int[Tensor, "N K"]
) -> tuple[Int[Tensor, "N U"], Tensor]:
    """U = S_S united with S_T as [N, 2K] ids, and which entries count (a repeated id counts once)."""
    repeated = (teacher_ids.unsqueeze(2) == student_ids.unsqueeze(1)).any(-1)
    ids = torch.cat([student_ids, teacher_ids], dim=1)
    return ids, torch.cat([torch.ones_like(repeated), ~repeated], dim=1)


def disagreement(
    student_logprobs: Float[Tensor, "N U"], teacher_logprobs: Float[Tensor, "N U"]
) -> Float[Tensor, " N"]:
    """D = KL(p_T || p_S), both renormalised over the given ids; -inf in both marks an id that does not count.

    Source: eq. 3 and 9. In nats, >= 0.
    """
    student = student_logprobs - student_logprobs.logsumexp(-1, keepdim=True)
    teacher = teacher_logprobs - teacher_logprobs.logsumexp(-1, keepdim=True)
    gap = torch.where(teacher == -torch.inf, 0.0, teacher - student)
    return (teacher.exp() * gap).sum(-1).clamp_min(0.0)


def bhattacharyya(
    student_logprobs: Float[Tensor, "N U"], teacher_logprobs: Float[Tensor, "N U"]
) -> Float[Tensor, " N"]:
    """Sum over the given ids of sqrt(p_S p_T), both renormalised there; in [0, 1]."""
    student = student_logprobs - student_logprobs.logsumexp(-1, keepdim=True)
    teacher = teacher_logprobs - teacher_logprobs.logsumexp(-1, keepdim=True)
    return (0.5 * (student + teacher)).exp().sum(-1).clamp(0.0, 1.0)


def signals_from_logprobs(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    full_kl: bool = False,
) -> TokenSignals:
    """Every exact signal from two full rows of log-probs; the definition, and what each chunk runs.

    Args:
        full_kl: also compute both KL divergences over the full vocabulary (two more passes over V).
    """
    student_topk_logprobs, student_topk_ids = student_logprobs.topk(k, dim=-1)
    teacher_topk_logprobs, teacher_topk_ids = teacher_logprobs.topk(k, dim=-1)
    union, counts = support_union(student_topk_ids, teacher_topk_ids)
    student_on_union = student_logprobs.gather(1, union).masked_fill(~counts, -torch.inf)
    teacher_on_union = teacher_logprobs.gather(1, union).masked_fill(~counts, -torch.inf)
    shared = (2 * k - counts.sum(-1)).to(student_logprobs.dtype)
    student_probs, teacher_probs = student_logprobs.exp(), teacher_logprobs.exp()
    in_both = (student_topk_ids.unsqueeze(2) == teacher_topk_ids.unsqueeze(1)).any(-1)
    teacher_on_student = teacher_logprobs.gather(1, student_topk_ids).exp()
    gap = student_logprobs - teacher_logprobs if full_kl else None
    return TokenSignals(
        disagreement=disagreement(student_on_union, teacher_on_union),
        compatibility=teacher_on_student.sum(-1).clamp(0.0, 1.0),
        entropy=-(student_probs * student_logprobs).sum(-1),
        teacher_entropy=-(teacher_probs * teacher_logprobs).sum(-1),
        reverse_disagreement=disagreement(teacher_on_union, student_on_union),
        bhattacharyya=bhattacharyya(student_on_union, teacher_on_union),
        overlap=shared / k,
        jaccard=shared / (2 * k - shared),
        compatibility_is_exact=True,
        student_topk_ids=student_topk_ids,
        student_topk_logprobs=student_topk_logprobs,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_logprobs=teacher_topk_logprobs,
        student_logprobs=student_logprobs.gather(1, target_ids.unsqueeze(1)).squeeze(1),
        teacher_logprobs=teacher_logprobs.gather(1, target_ids.unsqueeze(1)).squeeze(1),
        forward_kl=None if gap is None else -(teacher_probs * gap).sum(-1),
        reverse_kl=None if gap is None else (student_probs * gap).sum(-1),
        compatibility_bound=(teacher_on_student * in_both).sum(-1).clamp(0.0, 1.0),
    )


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
    chunk_elements: int = CHUNK_ELEMENTS,
    locate: Callable[[int], str] = "row {}".format,
) -> TokenSignals:
    """Exact signals of N positions from hidden states and heads, chunk by chunk.

    Args:
        target_ids: the sampled tokens.
        temperature: divides the logits of both models.
        chunk_elements: entries of one logits tensor; bounds the memory.
        locate: turns a row number into words for an error message.

    Raises:
        ConfigError: if k exceeds the shared vocabulary.
        ShapeError: if the heads' vocabularies differ or the hidden states' lengths do.
        NumericsError: on NaN or infinite logits; names the model and the row.
    """
    vocab_size = student_head.vocab_size
    if vocab_size != teacher_head.vocab_size:
        raise ShapeError(
            f"the student's head has {vocab_size} ids and the teacher's {teacher_head.vocab_size}; cut both "
            "to the ids their tokenizers share"
        )
    if not student_hidden.shape[0] == teacher_hidden.shape[0] == target_ids.shape[0]:
        raise ShapeError(
            f"student_hidden has {student_hidden.shape[0]} positions, teacher_hidden "
            f"{teacher_hidden.shape[0]}, target_ids {target_ids.shape[0]}; all must agree"
        )
    if k > vocab_size:
        raise ConfigError(f"score_top_k={k}: larger than the vocabulary of {vocab_size} ids")
    size = positions_per_chunk(vocab_size, chunk_elements)
    student_head = student_head.cast(student_hidden.dtype)
    teacher_head = teacher_head.cast(teacher_hidden.dtype)
    chunks = []
    for start in range(0, max(1, target_ids.shape[0]), size):
        rows = slice(start, start + size)
        logprobs = []
        for name, hidden, head in (
            ("student", student_hidden[rows], student_head),
            ("teacher", teacher_hidden[rows], teacher_head),
        ):
            raw = head.project(hidden)
            # A sum is finite only if every entry is: one reduction instead of a mask of the same size.
            # Taken before the soft cap, which would turn an infinity into a number.
            finite = raw.sum(-1).isfinite()
            if not finite.all():
                row = start + int((~finite).nonzero()[0])
                raise NumericsError(
                    f"the {name}'s logits are NaN or infinite at {locate(row)}; check its weights, dtype and "
                    "learning rate"
                )
            logprobs.append(head.finish(raw, temperature).log_softmax(-1))
        student, teacher = logprobs
        chunks.append(
            signals_from_logprobs(student, teacher, target_ids[rows], k=k, full_kl=full_kl)
        )
    return concatenate(chunks)


def concatenate(chunks: list[TokenSignals]) -> TokenSignals:
    """One `TokenSignals` from consecutive blocks of positions (at least one block)."""
    joined: dict[str, Tensor | bool | None] = {}
    for name in TokenSignals.__dataclass_fields__:
        values = [getattr(chunk, name) for chunk in chunks]
        if name == "compatibility_is_exact":
            joined[name] = all(values)
        else:
            joined[name] = None if values[0] is None else torch.cat(values)
    return TokenSignals(**joined)  # type: ignore[arg-type]
