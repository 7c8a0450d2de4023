"""The teacher protocol: request, scores, and checks of the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import TeacherError
from taopd.signals import concatenate

TOLERANCE = 1e-3
"""Nats by which numbers of one answer may contradict each other: servers round, but all alike."""
MASS_TOLERANCE = 0.02
"""By which a list's mass may exceed 1: a server that rounds log-probs to bfloat16 is off by 2^-9 of each, so
by at most 2^-9 times the list's entropy, 0.01 at 100 entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """A teacher's scores of N completion tokens, in the order (sequence, position); nats, float32."""

    logprobs: Float[Tensor, " N"]
    """Of the sampled tokens."""
    topk_ids: Int[Tensor, "N K"]
    """Best first; -1 where a list is shorter than K."""
    topk_logprobs: Float[Tensor, "N K"]
    """Best first; -inf where a list is shorter than K."""
    want_logprobs: Float[Tensor, "N W"] | None
    """Of the wanted ids, exact. None: the teacher gives its own list only, so that its mass on other ids is
    known as a lower bound. All of an answer is one or the other."""

    @property
    def exact(self) -> bool:
        """Whether the wanted ids were scored."""
        return self.want_logprobs is not None


@runtime_checkable
class Teacher(Protocol):
    """Protocol of a model that scores completions token by token; see `local`, `vllm` and `sglang`.

    `score` is called from several threads at once, one per micro-batch.
    """

    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        completion_start: Sequence[int],
        want_ids: Int[Tensor, "N W"] | None,
        top_k: int,
    ) -> TeacherScores:
        """Score the tokens of every sequence from its `completion_start` on, N in all.

        Args:
            token_ids: prompt and completion of each sequence, without padding.
            want_ids: ids to score at each of these tokens; None: none.
            top_k: entries of the teacher's own list.

        Raises:
            TeacherError: the teacher cannot, or its answer cannot be true.
            TeacherUnavailable: it stayed away for too long.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Description for the log and the run folder; `exact`: whether it scores wanted ids."""
        ...


def room(teacher: Any) -> int | None:
    """Tokens of a prompt and its completion that a remote teacher takes; None where it does not say.

    One less than its context: a server insists on adding a token of its own.
    """
    limit = getattr(teacher, "context_length", None)
    return None if limit is None else limit - 1


def by_sequence(
    token_ids: Sequence[Sequence[int]],
    completion_start: Sequence[int],
    want_ids: Int[Tensor, "N W"] | None,
) -> list[Tensor | None]:
    """The wanted ids of each sequence, on the CPU; None where none are wanted."""
    lengths = [len(ids) - at for ids, at in zip(token_ids, completion_start, strict=True)]
    return [None] * len(lengths) if want_ids is None else list(want_ids.cpu().split(lengths))


def join(parts: Sequence[TeacherScores]) -> TeacherScores:
    """Concatenated scores; exact if all parts are."""
    return concatenate(parts)


def check_scores(
    scores: TeacherScores,
    token_ids: Int[Tensor, " N"],
    want_ids: Int[Tensor, "N W"] | None,
    vocab_size: int,
) -> None:
    """Refuse scores that contradict each other.

    Shapes; finite log-probs of at most 0; lists sorted, without repeats, ids in [0, vocab_size), mass of at
    most 1; a token in the list has the list's log-prob, one that is not has no more than its last.

    Raises:
        TeacherError: says what is wrong, and at which token of the completion.
    """
    count = len(token_ids)
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    for name, value in (("log-probs", scores.logprobs), ("lists", ids), ("lists", logprobs)):
        if len(value) != count:
            raise TeacherError(f"{len(value)} {name} for {count} completion tokens")
    _refuse(~torch.isfinite(scores.logprobs), "log-prob of the sampled token is not finite")
    _refuse(scores.logprobs > TOLERANCE, "log-prob of the sampled token is above 0")
    listed = ids >= 0
    _refuse(~listed[:, :1].any(1), "list is empty")
    _refuse((listed[:, 1:] & ~listed[:, :-1]).any(1), "list has a gap")
    outside = (ids >= vocab_size).any(1)
    _refuse(outside, f"list holds an id outside of the vocabulary of {vocab_size}")
    # A comparison with NaN is false.
    _refuse(~(logprobs <= TOLERANCE).all(1), "list holds a NaN or is above 0")
    _refuse((torch.isinf(logprobs) & listed).any(1), "list holds an infinite log-prob")
    _refuse((logprobs[:, 1:] > logprobs[:, :-1] + TOLERANCE).any(1), "list is not sorted")
    ordered = ids.masked_fill(~listed, -1).sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse(repeated.any(1), "list repeats an id")
    mass = logprobs.exp().masked_fill(~listed, 0.0).sum(1)
    _refuse(mass > 1.0 + MASS_TOLERANCE, "list has a mass above 1")
    _fits("sampled token", token_ids.unsqueeze(1), scores.logprobs.unsqueeze(1), scores)
    if scores.want_logprobs is None:
        return
    if want_ids is None or scores.want_logprobs.shape != want_ids.shape:
        raise TeacherError(
            f"log-probs of wanted ids have the shape {list(scores.want_logprobs.shape)}"
        )
    _refuse(~torch.isfinite(scores.want_logprobs).all(1), "log-prob of a wanted id is not finite")
    _refuse((scores.want_logprobs > TOLERANCE).any(1), "log-prob of a wanted id is above 0")
    _fits("wanted id", want_ids, scores.want_logprobs, scores)


def _fits(what: str, ids: Tensor, logprobs: Tensor, scores: TeacherScores) -> None:
    """Check log-probs against the list: equal where it holds the id, else at most its last entry."""
    same = ids.unsqueeze(2) == scores.topk_ids.unsqueeze(1)
    listed = torch.where(same, scores.topk_logprobs.unsqueeze(1), 0.0).sum(2)
    last = scores.topk_logprobs.masked_fill(scores.topk_ids < 0, torch.inf).min(1).values
    inside = same.any(2)
    other = inside & ((logprobs - listed).abs() > TOLERANCE)
    _refuse(other.any(1), f"log-prob of the {what} is not the list's")
    better = ~inside & (logprobs > last.unsqueeze(1) + TOLERANCE)
    _refuse(better.any(1), f"{what} is better than the list's last entry, but not in the list")


def _refuse(wrong: Tensor, what: str) -> None:
    if bool(wrong.any()):
        raise TeacherError(f"completion token {int(wrong.nonzero()[0])}: {what}")
