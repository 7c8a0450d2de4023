"""Answers of a teacher's server that are remembered, so that one question is asked once.

Completions repeat: short ones among the samples of a prompt, and prompts in a later batch. A question is the
sequence, where its completion begins and the wanted ids, so an answer that is given again is the answer.

Not here: `TeacherProbe`, which asks again on purpose and so asks the server itself.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from taopd.signals import taken
from taopd.teachers.protocol import Teacher, TeacherScores, by_sequence, join

MOST_TOKENS = 1 << 16
"""Completion tokens whose answers are kept, the latest; some 300 bytes each at K = 16."""


class _Key(NamedTuple):
    tokens: tuple[int, ...]
    start: int
    want: bytes
    top_k: int


class AskedOnce:
    """A `Teacher` that asks another one only what it has not just been asked."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._known: OrderedDict[_Key, TeacherScores] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Of the teacher that is asked."""
        return self._teacher.describe()

    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        completion_start: Sequence[int],
        want_ids: Int[Tensor, "N W"] | None,
        top_k: int,
    ) -> TeacherScores:
        """See `Teacher.score`."""
        wants = by_sequence(token_ids, completion_start, want_ids)
        keys = [
            _Key(tuple(ids), at, b"" if want is None else want.numpy().tobytes(), top_k)
            for ids, at, want in zip(token_ids, completion_start, wants, strict=True)
        ]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            for key in found:
                self._known.move_to_end(key)
        new: dict[_Key, int] = {}
        for place, key in enumerate(keys):
            if key not in found:
                new.setdefault(key, place)
        if new:
            places = list(new.values())
            asked = [want for place in places if (want := wants[place]) is not None]
            answer = self._teacher.score(
                [token_ids[place] for place in places],
                [completion_start[place] for place in places],
                torch.cat(asked) if asked else None,
                top_k,
            )
            lengths = [len(token_ids[place]) - completion_start[place] for place in places]
            found |= dict(zip(new, _split(answer, lengths), strict=True))
            self._keep({key: found[key] for key in new})
        return join([found[key] for key in keys])

    def _keep(self, answers: dict[_Key, TeacherScores]) -> None:
        with self._lock:
            for key, scores in answers.items():
                if key not in self._known:
                    self._size += len(scores.logprobs)
                self._known[key] = scores
            while self._size > MOST_TOKENS:
                self._size -= len(self._known.popitem(last=False)[1].logprobs)


def _split(scores: TeacherScores, lengths: Sequence[int]) -> list[TeacherScores]:
    """The scores of each sequence."""
    places = torch.arange(sum(lengths)).split(list(lengths))
    return [taken(scores, place.to(scores.logprobs.device)) for place in places]
