"""`warnings.jsonl` of a run: what the guards of a run saw, with the step, for the report."""

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from taopd.runs.jsonl import append_jsonl, cut_lines

WARNINGS_FILE = "warnings.jsonl"

logger = logging.getLogger(__name__)


class RunWarnings(TrainerCallback):
    """Writes warnings of the first process to the log and to the run folder.

    A run that starts anew has none; a resumed run drops those after its checkpoint.
    """

    def __init__(self, folder: str, accelerator: Accelerator) -> None:
        self._path, self._accelerator = Path(folder) / WARNINGS_FILE, accelerator
        self._count = 0

    def add(self, step: int, source: str, reason: str) -> None:
        """Warn of something that `source` saw at a step."""
        # All processes see the same; one writes.
        if not self._accelerator.is_main_process:
            return
        logger.warning("step %d, %s: %s", step, source, reason)
        append_jsonl(self._path, {"step": step, "source": source, "reason": reason})
        self._count += 1

    # -- callback ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.load_checkpoint_state(0)

    def checkpoint_state(self) -> int:
        """How many warnings are on file."""
        return self._count

    def load_checkpoint_state(self, state: int) -> None:
        """Go on from `checkpoint_state()`; later warnings are taken off the file."""
        self._count = state
        if self._accelerator.is_main_process:
            cut_lines(self._path, state)
