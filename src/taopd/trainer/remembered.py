"""`choose` with a memory: what one generation batch tells the next, kept with every checkpoint."""

import dataclasses
from typing import Any

from transformers import TrainerCallback

from taopd.selectors import Calibration
from taopd.signals import SignalTable
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import Choice, choose


class Chooser(TrainerCallback):
    """Calls `choose` and carries its calibration from batch to batch; as a callback, into checkpoints."""

    def __init__(self) -> None:
        self.calibration: Calibration | None = None

    def __call__(
        self, table: SignalTable, args: TeachabilityConfig, *, step: int, training: bool
    ) -> Choice:
        """`choose` with the calibration of the batches so far; a collective where the table is spread."""
        choice = choose(table, args, step=step, training=training, calibration=self.calibration)
        if training:
            self.calibration = choice.selection.calibration
        return choice

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calibration = None

    def checkpoint_state(self) -> dict[str, Any] | None:
        """What the next batch would be told."""
        return None if self.calibration is None else dataclasses.asdict(self.calibration)

    def load_checkpoint_state(self, state: dict[str, Any] | None) -> None:
        """Go on from `checkpoint_state()`."""
        self.calibration = None if state is None else Calibration(**state)
