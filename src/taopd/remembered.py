"""`choose` with a memory: what one generation batch tells the next, kept with every checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from taopd.choose import Choice, choose
from taopd.config import TeachabilityConfig
from taopd.records import write_json
from taopd.selectors import Calibration
from taopd.signals import SignalTable

FILE = "calibration.json"


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
        if args.budget_memory is None or state.global_step == 0:
            return
        path = _folder(args, state) / FILE
        if not path.exists():
            logging.getLogger(__name__).warning(
                "no %s: the remembered threshold starts anew with the next batch", path
            )
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        scales = {name: (low, high) for name, (low, high) in stored["scales"].items()}
        self.calibration = Calibration(scales=scales, threshold=stored["threshold"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.calibration is not None and state.is_world_process_zero:
            write_json(_folder(args, state) / FILE, self.calibration)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
