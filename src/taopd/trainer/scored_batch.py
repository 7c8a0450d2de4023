"""A generation batch after selection: what the trainer hands to the anchor, the guard and every observer."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from taopd.models.batch import Positions
from taopd.signals import SignalTable, TokenSignals
from taopd.trainer.selection import Choice


# Frozen: several observers see it, and the loss reads it after them.
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """This process's part of a generation batch, its signals, and what was selected of it."""

    step: int
    """Optimizer steps taken before this batch: 0 for the first one."""
    batch: dict[str, Any]
    """TRL's padded batch: prompt_ids, prompt_mask, completion_ids, completion_mask; and "answers", the
    dataset's answer to each prompt, None where it has none."""
    positions: Positions
    """The N valid positions of this process."""
    token_ids: Int[Tensor, " N"]
    """The sampled tokens there."""
    signals: TokenSignals
    """Of these N positions."""
    table: SignalTable
    """What was selected from: the positions of all processes, or where they are too many this one's."""
    choice: Choice
    """Of the positions in `table`."""
    local: slice
    """Where this process's N positions are in `table`."""
    stop_ids: tuple[int, ...]
    """Ids at which the sampler stops, and the padding that stands in for one."""
    tokenizer: PreTrainedTokenizerBase
    teachers: tuple[str, ...] = ()
    """Of several, in the order of the batch's "teacher_index"; one has no name."""

    @property
    def of_teacher(self) -> Int[Tensor, " N"] | None:
        """Which of several teachers each position has."""
        return self.batch["teacher_index"][self.positions.row] if self.teachers else None

    @property
    def number(self) -> int:
        """The step that trains on it as every log counts: 1 for the first one."""
        return self.step + 1
