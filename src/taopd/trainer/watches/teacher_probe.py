"""Probes a teacher that is asked over the network: the first batch, and a sample of the later ones.

The lists of every probed batch are compared with the student's. A server is also asked one sequence of the
first batch again: whatever changed since then shows there, however related the models are.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taopd.errors import TeacherError
from taopd.models.batch import Positions, unpadded
from taopd.signals import TokenSignals
from taopd.teachers import ServerTeacher, Teacher, TeacherPool
from taopd.teachers.honesty import Answer, agreement, changed

EVERY = 8
"""Batches between two probes, after the first few."""

logger = logging.getLogger(__name__)


class TeacherProbe:
    """Looks at answers of one process.

    Args:
        vocab_size: ids that both models share; k: entries of a list.
    """

    def __init__(self, teacher: Teacher, vocab_size: int, k: int) -> None:
        self._teacher, self._vocab_size, self._k = teacher, vocab_size, k
        self._batches = 0
        self._question: tuple[list[int], int] | None = None
        self._answer: Answer | None = None
        self._told: set[str] = set()

    def look(
        self, batch: Mapping[str, Tensor], positions: Positions, signals: TokenSignals
    ) -> None:
        """Probe a scored batch, if it is its turn; warns of what may be meant.

        Raises:
            TeacherError: the answers are shifted, or are another model's than before.
        """
        count, self._batches = self._batches, self._batches + 1
        # Often at first, where a mistake is likely and cheap to correct: batches 0, 1, 2, 4, 8, 16, 24, ...
        if count & (count - 1) and count % EVERY:
            return
        fault = agreement(signals, positions).fault(self._vocab_size, self._k)
        if fault is not None and fault.kind == "shift":
            raise TeacherError(fault.text)
        if fault is not None and fault.kind not in self._told:
            self._told.add(fault.kind)
            logger.warning("%s", fault.text)
        # A teacher object of the user's may change by design; a server does not.
        if isinstance(self._teacher, ServerTeacher | TeacherPool):
            self._ask_again(batch, positions)

    def _ask_again(self, batch: Mapping[str, Tensor], positions: Positions) -> None:
        if self._question is None:
            if not len(positions):
                return
            row = int(positions.row[0])
            prompt = unpadded(batch, "prompt", row)
            self._question = [*prompt, *unpadded(batch, "completion", row)], len(prompt)
        answer = self._answer_to(*self._question)
        self._answer = self._answer or answer
        if difference := changed(self._answer, answer):
            raise TeacherError(difference)

    def _answer_to(self, ids: list[int], num_prompt: int) -> Answer:
        scores = self._teacher.score([ids], [num_prompt], None, self._k)
        columns = scores.logprobs, scores.topk_ids, scores.topk_logprobs
        return Answer(*(torch.as_tensor(column).cpu() for column in columns))

    # -- between two starts of a run ----------------------------------------------------------------

    @property
    def asked(self) -> dict[str, Any] | None:
        """The question of the first batch and its answer; None: none was asked yet."""
        if self._question is None or self._answer is None:
            return None
        ids, num_prompt = self._question
        return {
            "ids": ids,
            "num_prompt": num_prompt,
            "k": self._k,
            "answer": [column.tolist() for column in self._answer],
        }

    def answers_otherwise(self, before: dict[str, Any]) -> str:
        """How the teacher now answers what it was asked in an earlier start of the run; "" if as then."""
        if before["k"] != self._k:
            return ""
        try:
            answer = self._answer_to(before["ids"], before["num_prompt"])
        except TeacherError:
            # The first batch will say so, as at every start.
            return ""
        return changed(Answer(*map(torch.tensor, before["answer"])), answer)
