"""Watches a training run for collapse; warns, stops, or goes back to the last healthy checkpoint.

The numbers are from batches that were scored anyway, and from the initial student's forward on a few
completions every `guard_every` steps; `collapse_detector` decides. Its memory travels with checkpoints.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from taopd.runs.checkpoints import checkpoints, step_of, why_incomplete
from taopd.signals import SignalTable
from taopd.trainer.checkpoint.fsdp import layout_of
from taopd.trainer.selection import Choice
from taopd.trainer.watches.collapse_detector import CollapseWatch

BANK_GAIN = "bank/gain_forward_nats/mean"

logger = logging.getLogger("taopd.trainer.collapse_guard")


class CollapseGuard(TrainerCallback):
    """Feeds `CollapseWatch` and acts on what it finds.

    Args:
        action: "warn", "stop" or "restore".
        record: takes (metric, value); warn: takes (step, source, reason).
        load_checkpoint: puts a checkpoint folder's weights into the model; called at most once.
    """

    def __init__(
        self,
        action: str,
        output_dir: str,
        accelerator: Accelerator,
        record: Callable[[str, float], None],
        warn: Callable[[int, str, str], None],
        load_checkpoint: Callable[[str], Any],
    ) -> None:
        self._action, self._folder = action, Path(output_dir)
        self._accelerator, self._record, self._warn = accelerator, record, warn
        self._load_checkpoint = load_checkpoint
        self._layout = layout_of(accelerator)
        self.watch = CollapseWatch()
        self.restored = False
        """Whether the weights are those of a checkpoint again."""

    @classmethod
    def of(cls, action: str, *sinks: Any) -> "CollapseGuard | None":
        """The guard, None where the action is "off"."""
        return None if action == "off" else cls(action, *sinks)

    def measure(
        self,
        step: int,
        table: SignalTable,
        choice: Choice,
        idle_drift: Float[Tensor, " n"],
    ) -> None:
        """Add one measurement; the same decision on every rank.

        Args:
            table: of the whole generation batch; choice: what was selected of it.
            idle_drift: nats, at the watched tokens of this rank.
        """
        valid, ranks, num_valid = table.valid, table.ranks, choice.selection.num_valid
        # Sums and not means: processes hold different numbers of watched tokens.
        sums = torch.stack(
            [idle_drift.double().sum(), idle_drift.new_tensor(len(idle_drift)).double()]
        )
        total, count = self._accelerator.reduce(sums.float(), reduction="sum").tolist()
        entropy = float(ranks.sums(table.entropy[valid].double().sum()))
        num_responses = ranks.total(table.completion[valid].unique().numel())
        values = {
            "entropy": entropy / max(1, num_valid),
            "length": num_valid / max(1, num_responses),
        }
        if count:
            values["idle_drift"] = total / count
            self._record("guard/idle_drift_nats", total / count)
        self._update(step, values)

    def _update(self, step: int, values: dict[str, float]) -> None:
        """Tell the watch; warn of what is new."""
        for reason in self.watch.update(step, values):
            self._warn(step, "collapse guard", f"the run may be collapsing: {reason}")

    # -- callback ---------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if BANK_GAIN in (logs or {}):
            self._update(state.global_step, {"bank_gain": logs[BANK_GAIN]})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the end of a step, so that the checkpoint that follows is a whole one.
        if self.watch.fired and self._action != "warn":
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.watch.fired or self._action != "restore":
            return
        old = (p for p in checkpoints(self._folder) if (step_of(p) or 0) <= self.watch.healthy_step)
        healthy = next((p for p in old if why_incomplete(p, self._layout) is None), None)
        if healthy is None:
            logger.warning(
                "no complete checkpoint is as old as step %d, the last step without a sign of collapse: "
                "the weights stay as they are; lower save_steps to have one",
                self.watch.healthy_step,
            )
            return
        logger.warning("collapse guard: the weights are those of %s again", healthy)
        self._load_checkpoint(str(healthy))
        self.restored = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch, self.restored = CollapseWatch(), False

    def checkpoint_state(self) -> dict[str, Any]:
        """Memory of the watch."""
        return self.watch.state()

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.watch.load(state)
