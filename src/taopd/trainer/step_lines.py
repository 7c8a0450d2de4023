"""Progress of a training run: one line per logged step on stderr, the same with and without a terminal.

Why not a bar with columns: a run is watched over ssh, in a queue's log file and in CI, and all of them
keep lines. transformers' own bar and its dictionaries of some seventy keys are switched off; every key is
in `metrics.jsonl`. `trainer.remove_callback(StepLines)` silences them.
"""

import os
import sys
import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from taopd.runs import heartbeat
from taopd.runs.limits import compatibility_words, entropy_unit
from taopd.runs.shares import per_cent
from taopd.trainer.step_metrics import LOSS_PARTS

COLUMNS = (
    ("loss", "loss", "{:.4g}".format),
    ("select/kept_fraction", "kept", lambda share: f"{per_cent(share)}%"),
    ("signal/disagreement_nats/mean", "D", "{:.3g}".format),
    ("signal/compatibility/mean", "C", "{:.3g}".format),
    ("signal/entropy_nats/mean", "H", "{:.3g}".format),
    ("update/norm", "update", "{:.2g}".format),
    ("step_time", "s/step", "{:.2g}".format),
)
"""(metric, word, its text), in the order of the line."""
LEGEND = (
    "loss and D (disagreement of student and teacher) in nats a token; C: {compatibility}; H: the student's "
    "entropy, {entropy}; update: length of the step in weight space; left: h:mm:ss"
)
"""Said once, above the first line."""


class StepLines(TrainerCallback):
    """Writes a line whenever the trainer logs metrics of a training step."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._started = 0.0
        self._first = self._shown = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._first = time.monotonic(), state.global_step
        self._shown = state.global_step
        heartbeat.current().report(lambda: self._words(state))

    def on_train_end(self, args, state, control, **kwargs):
        heartbeat.current().report(None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = dict(logs or {})
        # A run that ends between two logs: its closing entry has the metrics since the last one.
        if "train_loss" in logs and self._shown < state.global_step:
            logs["loss"] = _closing_loss(logs, args)
        if state.is_world_process_zero and "loss" in logs:
            seconds = time.monotonic() - self._started
            done = state.global_step - self._first
            left = seconds / max(1, done) * (state.max_steps - state.global_step)
            line = step_line(state.global_step, state.max_steps, logs, left)
            # A run whose first line has none of these needs no words for them.
            explained = self._shown > self._first or COLUMNS[2][0] not in logs
            if not explained:
                words = compatibility_words(args.compatibility), entropy_unit(args.signals)
                legend = LEGEND.format(compatibility=words[0], entropy=words[1])
                print(legend, file=self._stream)
            print(line, file=self._stream, flush=True)
            self._shown = state.global_step
            heartbeat.current().touch()
        elif state.is_world_process_zero and isinstance(logs.get("eval_loss"), int | float):
            line = f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4g}"
            print(line, file=self._stream, flush=True)

    def _words(self, state) -> str:
        """Of a step that takes long, or of steps between two logs."""
        done, rest = state.global_step - self._first, state.max_steps - self._first
        left = heartbeat.left(time.monotonic() - self._started, done, rest)
        return f"step {state.global_step} of {state.max_steps} done, {left}"


def _closing_loss(logs: dict[str, Any], args: Any) -> float:
    """The mean loss since the last line, from its parts: `train_loss` is that of the whole run."""
    own, anchor = (logs.get(name) for name in LOSS_PARTS)
    if own is None:
        return logs["train_loss"]
    return own + (args.anchor_coef or 0.0) * (anchor or 0.0)


def step_line(step: int, steps: int, logs: dict[str, Any], seconds_left: float) -> str:
    """One step in one line.

    Example:
        >>> step_line(7, 100, {"loss": 1.25, "select/kept_fraction": 0.05}, 75)
        'step   7/100  loss 1.25  kept 5.0%  left 0:01:15'
    """
    width = len(str(steps))
    parts = [f"step {step:>{width}}/{steps}"]
    parts += [
        f"{word} {shown(logs[name])}"
        for name, word, shown in COLUMNS
        if isinstance(logs.get(name), int | float)
    ]
    return "  ".join([*parts, f"left {heartbeat.clock(seconds_left)}"])


def attach(trainer: Any) -> None:
    """Put these lines in the place of a trainer's progress bar and printed dictionaries."""
    shown = {type(each) for each in trainer.callback_handler.callbacks}
    # A notebook has a table of its own, which stays.
    for usual in shown & {ProgressCallback, PrinterCallback}:
        trainer.remove_callback(usual)
        trainer.add_callback(StepLines())


def plain(*, quiet: bool) -> None:
    """No bars of transformers (loading, saving) where nobody sees them move, or when quiet."""
    # Under a launcher every process is a command of its own; the first one speaks.
    if quiet or os.environ.get("RANK", "0") != "0":
        heartbeat.current().mute()
    if quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
