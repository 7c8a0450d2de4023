"""Figures of one real micro-batch, which both models score once; `rollout_checks` judges them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.kernels import probabilities_at
from taopd.models.batch import Forward, Positions, teacher_side, unpadded
from taopd.models.own_forward import Agreement
from taopd.models.sampler_drift import Drift, drift
from taopd.models.scoring import Given, Reuse, check_readable
from taopd.models.stop_tokens import ends_of, merged_ids, possible_stop_ids
from taopd.preflight.teacher_context import ContextEffect, measure_context
from taopd.preflight.teacher_error import TeacherError, exact_of
from taopd.preflight.tokenizer_checks import token_name
from taopd.signals import TokenSignals
from taopd.teachers import Teacher, score_remote


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One scored micro-batch of B completions and N tokens."""

    signals: TokenSignals
    positions: Positions
    """Where the N tokens are."""
    batch: Mapping[str, Tensor]
    """The padded prompts and completions."""
    lengths: Int[Tensor, " B"]
    ended: Bool[Tensor, " B"]
    drift: Drift | None
    stops: dict[int, str]
    """Ids at which the sampler stops, with their tokens."""
    candidates: dict[int, str]
    """All ids that may end a text, those included."""
    student_stops: Float[Tensor, "E M"]
    """Probability of every candidate where one of E completions ended; likewise the teacher's."""
    teacher_stops: Float[Tensor, "E M"]
    max_tokens: int
    """At which sampling was cut for this measurement."""
    agreement: Mapping[str, Agreement]
    """Of the scoring path with the own forward of each model in this process."""
    teacher_error: TeacherError | str | None = None
    """Of a teacher that is packed or moved, or why it is not known."""
    context: ContextEffect | None = None
    """Of the teacher's own prompts; None: it reads the student's."""
    teacher_stops_unknown: float = 0.0
    """Mean mass on the candidates that `teacher_stops` may lack, where it is read off a list."""


@torch.no_grad()
def run_passes(
    forward: Forward, student, teacher, batch: Mapping[str, Tensor], micro_batch_size: int
) -> dict[str, Given]:
    """One forward of each model here over all completion tokens: every figure is read from its states.

    Args:
        teacher: None if it is elsewhere.

    Returns:
        By "student" and "teacher".

    Raises:
        DataError: a prompt that the teacher cannot read.
    """
    side = teacher_side(batch)
    models = {"student": (student, batch)}
    if teacher is not None:
        check_readable(side, teacher)
        models["teacher"] = teacher, side
    everywhere = Positions.of(batch["completion_mask"].bool())
    return {
        name: Given.of(Reuse(), forward, model, read, everywhere, micro_batch_size=micro_batch_size)
        for name, (model, read) in models.items()
    }


@torch.no_grad()
def measure(
    trainer: Any,
    source: Any,
    batch: Mapping[str, Tensor],
    passes: Mapping[str, Given],
    *,
    micro_batch_size: int,
    max_tokens: int,
) -> Measured:
    """Figures of sampled completions under both models; see `Measured`.

    Args:
        source: the `TeacherSource` whose teacher is measured. Of one elsewhere the divergence over the full
            vocabulary is not sent, and its mass on stop ids is exact only where it scores wanted ids.
        passes: see `run_passes`.
        max_tokens: at which sampling was cut.

    Raises:
        NumericsError: on NaN or infinite logits. TeacherError: see `Teacher.score`.
    """
    args, tokenizer, remote = trainer.args, trainer.text_tokenizer, source.remote is not None
    both = trainer.forward_states, trainer.model_wrapped
    teacher = source.remote if remote else source.model
    temperature, vocab_size, k = trainer.temperature, trainer.vocab_size, args.score_top_k
    agreement = source.compare(*both, batch)
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    positions = Positions.of(mask & (ids < vocab_size))
    models = *both, teacher, batch, positions
    common: dict[str, Any] = {"micro_batch_size": micro_batch_size, "k": k, "when": "taopd check"}
    reuse = passes["student" if remote else "teacher"]
    if remote:
        signals = score_remote(*models, vocab_size=vocab_size, reuse=reuse, **common).signals
    else:
        of_student, of_teacher = (passes[name].at(positions) for name in ("student", "teacher"))
        targets = ids[positions.row, positions.column]
        locate = partial(positions.describe, when="taopd check")
        signals = exact_of(trainer, of_student, of_teacher, targets, locate)
    stops = _named(tokenizer, trainer.eos_token_ids)
    rows, lengths = torch.arange(len(ids), device=ids.device), mask.sum(1)
    last = ids[rows, lengths - 1]
    ended = torch.isin(last, last.new_tensor(list(stops)))
    ends = Positions(row=rows[ended], column=lengths[ended] - 1, shape=(len(ids), ids.shape[1]))
    # Ids that may end a text: of the sampler, the teacher, the settings, and every special token.
    possible = trainer.eos_token_ids, ends_of(source.model), args.stop_token_ids or []
    candidates = possible_stop_ids(tokenizer, *possible)
    wanted = [token for token in candidates if token < vocab_size]
    own, unknown = stop_masses(passes["student"], ends, wanted, temperature), 0.0
    if remote:
        teachers, unknown = _remote_masses(teacher, teacher_side(batch), ends, wanted, k)
    else:
        teachers = stop_masses(passes["teacher"], ends, wanted, temperature)
    settings = common | {"vocab_size": vocab_size, "temperature": temperature}
    context = measure_context(*models, remote=remote, reuse=reuse, **settings)
    compared, sampling_logprobs = None, trainer.sampler_monitor.logprobs
    if sampling_logprobs is not None and signals.student_logprobs is not None:
        recomputed = signals.student_logprobs
        merged = merged_ids(args.stop_tokens, trainer.stop_ids)
        compared = drift(sampling_logprobs, ids, positions, recomputed, merged_ids=merged)
    return Measured(
        signals=signals,
        positions=positions,
        batch=batch,
        lengths=lengths,
        ended=ended,
        drift=compared,
        stops=stops,
        candidates=_named(tokenizer, wanted),
        student_stops=own,
        teacher_stops=teachers,
        agreement=agreement,
        context=context,
        teacher_stops_unknown=unknown,
        max_tokens=max_tokens,
    )


def _named(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    return {index: token_name(tokenizer, index).rpartition(" (")[0] for index in ids}


def stop_masses(
    given: Given, ends: Positions, wanted: list[int], temperature: float
) -> Float[Tensor, "E M"]:
    """Probability of the wanted ids where the completions' last tokens were sampled."""
    return probabilities_at(*given.at(ends), wanted, temperature=temperature).cpu()


def _remote_masses(
    teacher: Teacher, batch: Mapping[str, Tensor], ends: Positions, wanted: list[int], k: int
) -> tuple[Float[Tensor, "E M"], float]:
    """Probability of the wanted ids at the ends, and the mean mass at most that it misses.

    Exact where the teacher scores wanted ids; else what its list holds, and no more than the list's last
    probability for each id that is missing there.
    """
    sequences = [
        [*unpadded(batch, "prompt", row), *unpadded(batch, "completion", row)]
        for row in ends.row.tolist()
    ]
    if not sequences:
        return torch.zeros(0, len(wanted)), 0.0
    starts, parts, unknown = [len(tokens) - 1 for tokens in sequences], [], 0.0
    for first in range(0, len(wanted), k):  # servers limit the ids of one request
        ids = torch.tensor(wanted[first : first + k]).expand(len(sequences), -1)
        scores = teacher.score(sequences, starts, ids, k)
        if scores.want_logprobs is not None:
            parts.append(scores.want_logprobs.exp().float().cpu())
            continue
        same = ids.unsqueeze(2) == scores.topk_ids.cpu().unsqueeze(1)
        listed = scores.topk_logprobs.cpu().exp()
        parts.append((same * listed.unsqueeze(1)).sum(2))
        missing = (~same.any(2)).sum(1)
        unknown += float((missing * listed.min(1).values).mean())
    return torch.cat(parts, dim=1), unknown
