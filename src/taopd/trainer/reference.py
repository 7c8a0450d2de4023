"""The student as it was before training: what the anchor holds the unselected tokens to."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import gathered, prepare_frozen
from taopd.models.scoring import Forward, Positions, states_at


class ReferenceStudent:
    """A frozen copy of the student; with LoRA the base model with the adapter off, no second model.

    Args:
        student: as it is given to the trainer, before any step.
    """

    def __init__(self, student: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.copy: Any = None
        """The prepared copy, or None where the adapter is switched off instead."""
        if not is_peft_model(student):
            with gathered(student.parameters()):
                frozen = copy.deepcopy(student).requires_grad_(False)
            self.copy = prepare_frozen(accelerator, frozen)

    @torch.no_grad()
    def states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        anchored: Bool[Tensor, "B T"],
        micro_batch_size: int,
    ) -> list[Float[Tensor, "n D"]]:
        """The reference's hidden states at the anchored positions, one tensor per row of the batch."""
        positions = Positions.of(anchored)
        with self._weights(student) as reference:
            parts = list(states_at(forward, reference, batch, positions, micro_batch_size))
        hidden = torch.cat([states for states, _ in parts])
        return positions.by_row(hidden, torch.ones_like(positions.row, dtype=torch.bool))

    @contextmanager
    def _weights(self, student: Any) -> Iterator[Any]:
        if self.copy is not None:
            yield self.copy
            return
        with self._accelerator.unwrap_model(student).disable_adapter():
            yield student
