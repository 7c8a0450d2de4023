"""A trainer callback that logs the gain on a small bank during training.

Measured outside the trainer's wrappers, in the dtype of the weights, in evaluation mode and without random
draws, so that training is not changed. Main process only. Sharded weights (FSDP, DeepSpeed ZeRO-3) are not
supported: measure the checkpoints afterwards.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from taopd.diagnose.bank import FixedContextBank
from taopd.diagnose.bank.score import measuring
from taopd.diagnose.gain import (
    CheckpointGain,
    check_vocabulary,
    model_gain,
    summarize,
    teacher_states,
)
from taopd.errors import ConfigError, DataError, require
from taopd.models.forward import State, bare
from taopd.trainer.build.own_teacher import AdapterTeacher

SAME_STUDENT_NATS = 1e-3
"""Mean |gain| before the first step above which the bank belongs to another student; the bank's own
student measures exactly 0, in another batch size below 1e-9 (float32 and bfloat16 micro models)."""


class BankCallback(TrainerCallback):
    """Logs `bank/*` metrics (see `taopd.trainer.metrics.METRICS`) every `every` optimizer steps.

    Example:
        >>> BankCallback.attach(trainer, bank, every=50)  # doctest: +SKIP

    Args:
        teacher: the bank's; its states at the bank's tokens are computed once and kept.
        record: takes (metric, value); the values of one logging window are averaged, so let `every` be a
            multiple of `logging_steps`.
        k: support size that splits learnable from incompatible tokens; see `learnable_groups`.

    Raises:
        ConfigError: `every` below 1.
        DataError: the bank is of another teacher; at the start of training: of another student.
    """

    def __init__(
        self,
        bank: FixedContextBank,
        teacher: Any,
        record: Callable[[str, float], None],
        *,
        every: int = 50,
        k: int | None = None,
    ) -> None:
        require(every >= 1, "every", every, "at least 1 step")
        self._bank, self._record, self._every, self._k = bank, record, every, k
        self._teacher: Any = bare(teacher)
        bank.check_model("teacher", self._teacher)
        self._teacher_states: list[State] | None = None
        self.curve: list[tuple[int, dict[str, float]]] = []
        """(step, logged metrics), with the point before training where it was measured."""

    @classmethod
    def attach(
        cls, trainer: Any, bank: FixedContextBank, *, every: int = 50, k: int | None = None
    ) -> "BankCallback":
        """A callback added to a `TeachabilityTrainer` with one teacher, a local one."""
        if trainer.teacher_model is None:
            raise ConfigError("a bank is of one teacher in this process; the trainer has another")
        if isinstance(trainer.teacher_model, AdapterTeacher):
            raise ConfigError(
                "a bank during training needs a teacher in one piece: with teacher self and an adapter "
                "measure the checkpoints with `taopd diagnose gain` instead"
            )
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        callback = cls(bank, teacher, trainer.record, every=every, k=k)
        trainer.add_callback(callback)
        return callback

    def measure(self, model: Any, step: int) -> CheckpointGain:
        """The gain of the model's current weights."""
        with torch.random.fork_rng(devices=[]):
            if self._teacher_states is None:
                with measuring(self._teacher):
                    self._teacher_states = list(teacher_states(self._bank, self._teacher))
            return model_gain(
                self._bank, model, self._teacher_states, label=f"step {step}", step=step
            )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        check_vocabulary(self._bank, bare(model), None, name="the student")
        if state.global_step > 0:
            return
        gain = self.measure(model, 0)
        size = float(gain.tokens["gain_forward"].abs().mean())
        if not size <= SAME_STUDENT_NATS:
            raise DataError(
                f"the bank is of another student: before the first step the mean |gain| is {size:.3g} "
                "nats, it must be 0; freeze a bank with this student, in this dtype"
            )
        self.curve.append((0, self._values(gain)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero or state.global_step % self._every:
            return
        started = time.perf_counter()
        values = self._values(self.measure(model, state.global_step))
        self.curve.append((state.global_step, values))
        for name, value in values.items():
            if value == value:
                self._record(name, value)
        self._record("perf/bank_s", time.perf_counter() - started)

    def checkpoint_state(self) -> list[tuple[int, dict[str, float]]]:
        """The curve so far."""
        return [(step, dict(values)) for step, values in self.curve]

    def load_checkpoint_state(self, state: list[tuple[int, dict[str, float]]]) -> None:
        """Restore the curve from `checkpoint_state()`."""
        self.curve = list(state)

    def _values(self, gain: CheckpointGain) -> dict[str, float]:
        measured = gain.measured
        values = {f"bank/{name}": value for name, value in summarize(measured, k=self._k).items()}
        return values | {"bank/excluded_fraction": gain.num_excluded / len(gain.tokens)}
