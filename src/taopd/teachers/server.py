"""Base of teachers behind a server: one concurrent request per sequence, every answer checked."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from taopd.errors import TeacherError
from taopd.teachers.protocol import TeacherScores, by_sequence, check_scores, join
from taopd.teachers.transport import Transport, message, refusal

MOST_REST, MOST_ENTRY = 4 << 20, 400
"""Bytes of an answer: of all that surrounds the numbers, and of a list's entry with its token in words."""
_MOST_SAID = 200
"""Characters of a malformed answer in a message."""


class Question(NamedTuple):
    """What a server is asked about one sequence."""

    tokens: list[int]
    start: int
    """Of the completion."""
    want: list[list[int]] | None
    top_k: int


class ServerTeacher(ABC):
    """A `Teacher` over HTTP.

    Args:
        vocab_size: ids that the teacher knows; an answer with another id is refused.
    """

    def __init__(self, transport: Transport, *, vocab_size: int) -> None:
        self._transport, self._vocab_size = transport, vocab_size

    context_length: int | None = None
    """Tokens of a sequence at most, where the server says."""
    served: tuple[str, ...] = ()
    """Names under which it serves its model: the served name, and the path or id it was started with."""

    def tokenize(self, text: str) -> list[int] | None:
        """Ids of a text by the server's tokenizer, without special tokens; None if it cannot tell."""
        return None

    def close(self) -> None:
        """Cancel requests in flight and close the connections."""
        self._transport.close()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Kind, URL, version, model; `exact`, and why not."""

    @abstractmethod
    def _can_score(self, want_ids: list[list[list[int]]]) -> bool:
        """Whether the wanted ids of all these sequences can be asked for."""

    @abstractmethod
    def _request(self, asked: Question) -> tuple[str, dict[str, Any]]:
        """Path and body."""

    @abstractmethod
    def _read(self, document: Any, asked: Question) -> TeacherScores:
        """The answer; one of `MALFORMED` if it is malformed."""

    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        completion_start: Sequence[int],
        want_ids: Int[Tensor, "N W"] | None,
        top_k: int,
    ) -> TeacherScores:
        """See `Teacher.score`. Wanted ids are scored for all sequences or for none."""
        parts = by_sequence(token_ids, completion_start, want_ids)
        wanted: list[Any] = [None if part is None else part.tolist() for part in parts]
        if want_ids is not None and not self._can_score(wanted):
            wanted = [None] * len(wanted)
        jobs = zip(token_ids, completion_start, wanted, strict=True)
        futures = [
            self._submit(Question(list(tokens), start, want, top_k)) for tokens, start, want in jobs
        ]
        try:
            return join([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def submit(
        self, tokens: Sequence[int], start: int, want_ids: Int[Tensor, "n W"] | None, top_k: int
    ) -> Future[TeacherScores]:
        """One sequence, without waiting; wanted ids only where the server scores them for this sequence.

        Raises (from `result()`):
            See `Teacher.score`.
        """
        want = None if want_ids is None else want_ids.tolist()
        if want is not None and not self._can_score([want]):
            want = None
        return self._submit(Question(list(tokens), start, want, top_k))

    def _submit(self, asked: Question) -> Future[TeacherScores]:
        if not 1 <= asked.start < len(asked.tokens):
            raise TeacherError(
                f"a sequence of {len(asked.tokens)} tokens, completion from {asked.start} on: both parts "
                "need a token"
            )
        path, body = self._request(asked)
        ids = 0 if asked.want is None else len({index for row in asked.want for index in row})
        most = MOST_REST + len(asked.tokens) * (asked.top_k + ids + 1) * MOST_ENTRY
        return self._transport.submit(
            path, body, lambda document: self._checked(document, asked), most_bytes=most
        )

    def _checked(self, document: Any, asked: Question) -> TeacherScores:
        """The answer; TeacherError if it is malformed or cannot be true."""
        try:
            scores = self._read(document, asked)
        except TeacherError:
            raise
        except MALFORMED as error:
            # An error under status 200 says what is wrong in words of the server's.
            said = f", which says: {message(document)[:_MOST_SAID]}" if document else ""
            raise TeacherError(
                f"malformed answer ({type(error).__name__}: {error}){said}"
            ) from error
        wanted = None if asked.want is None else torch.tensor(asked.want)
        sampled = torch.tensor(asked.tokens[asked.start :])
        check_scores(scores, sampled, wanted, self._vocab_size)
        # A shorter list would pass for a teacher with less mass on the student's ids.
        if bool((scores.topk_ids[:, : min(asked.top_k, self._vocab_size)] < 0).any()):
            raise TeacherError(
                f"a list of fewer than the {asked.top_k} entries that were asked for"
            )
        return scores

    def _try(self, asked: Question) -> None:
        """Ask once, in a request that is not repeated.

        Raises:
            TeacherError: the server refuses, or answers what cannot be true.
            TeacherUnavailable: nobody answers.
        """
        path, body = self._request(asked)
        status, answer = self._transport.post(path, body)
        where = f"{self._transport.url}{path}"
        if status != 200:
            raise TeacherError(f"{where} {refusal(status, answer)}")
        try:
            self._checked(answer, asked)
        except TeacherError as error:
            raise TeacherError(f"{where}: {error}") from error


MALFORMED = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)
"""What reading JSON of another shape raises."""


def read_scores(
    sampled: list[float], rows: list[list[tuple[int, float]]], wanted: Tensor | None, top_k: int
) -> TeacherScores:
    """Scores as tensors.

    Args:
        rows: the teacher's own list of (id, log-prob) at each token, best first; it may be shorter than K.
    """
    filled = [(entries + [(-1, -torch.inf)] * top_k)[:top_k] for entries in rows]
    ids = [[index for index, _ in entries] for entries in filled]
    logprobs = [[logprob for _, logprob in entries] for entries in filled]
    return TeacherScores(
        logprobs=torch.tensor(sampled, dtype=torch.float32),
        topk_ids=torch.tensor(ids, dtype=torch.long),
        topk_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        want_logprobs=wanted,
    )


def last_part(name: str) -> str:
    """The end of a path or hub id: folders and owners differ between machines."""
    return name.rstrip("/").rpartition("/")[2].casefold()


def number(value: Any) -> float:
    """A JSON number; TypeError for anything else, a string that looks like one included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def whole_number(value: Any, what: str = "token id") -> int:
    """A whole number from 0 on that fits int32; TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a {what}")
    if not 0 <= value < 2**31:
        raise ValueError(f"{value} is not a {what}")
    return value
