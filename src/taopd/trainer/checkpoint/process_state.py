"""The state of one process in a checkpoint, besides weights and optimizer.

    random generators (Python, NumPy, torch, the accelerator's), the states of callbacks, the metrics that are
    summed for the next log line, and the generation batch while further steps will use it

It is taken at the start of every step. A step that fails half-way (memory, teacher, NaN) can then be saved as
if it had not begun.
"""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from taopd.errors import ConfigError, DataError
from taopd.runs.checkpoints import STATE, process_file
from taopd.trainer.checkpoint.deferred_signals import DeferredSignals
from taopd.trainer.checkpoint.state_file import check_tree, load_tree, save_tree

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """A callback with state in checkpoints: numbers, texts and tensors in lists and dictionaries."""

    def checkpoint_state(self) -> Any:
        """The state to save; not modified afterwards."""

    def load_checkpoint_state(self, state: Any) -> None:
        """Restore what `checkpoint_state()` returned."""


class RankState(TrainerCallback):
    """Saves and restores the state of this process.

    Args:
        trainer: a `TeachabilityTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._at_step_start: dict[str, Any] | None = None
        """The state when the current step began, None between steps."""
        self.updating = False
        """The optimizer is updating the weights, which are of no step."""
        self.signals = DeferredSignals()
        self._savable = False
        """The optimizer has a state, and it was looked at."""

    def save(self, folder: Path) -> None:
        """Write this process's file of a checkpoint; inside a step, the state at the step's start."""
        trainer = self._trainer
        # A failure inside a step must not save the half of it that has run.
        state = dict(self._at_step_start or self._take())
        state["num_processes"] = trainer.args.world_size
        state["division"] = self._division()
        # The generation batch is used by several steps: the next one needs it as it was sampled.
        if trainer.state.global_step % trainer.args.num_iterations:
            state["buffer"] = trainer._buffered_inputs
            state["teachers"] = list(trainer.teacher_names)
        trainer.state.num_input_tokens_seen = state["tokens"]
        save_tree(folder / process_file("rank", trainer.args.process_index), state)

    def restore(self, folder: Path) -> None:
        """Restore the state of the process that wrote the checkpoint.

        Raises:
            DataError: the file is damaged. ConfigError: the checkpoint is in the middle of a generation batch
                that these settings divide otherwise.
        """
        trainer = self._trainer
        path = folder / process_file("rank", trainer.args.process_index)
        # More processes than before: the new ones begin with the first one's state.
        state = load_tree(path if path.exists() else folder / process_file("rank", 0))
        for name, callback in self._stateful():
            if name in state["callbacks"]:
                callback.load_checkpoint_state(state["callbacks"][name])
            else:
                logger.warning("%s has no state of %s: it starts anew", folder / STATE, name)
        if state["num_processes"] != trainer.args.world_size:
            logger.warning(
                "%s was saved by %d process(es), this run has %d: it goes on with other random draws",
                folder,
                state["num_processes"],
                trainer.args.world_size,
            )
            return
        _set_random_state(state["random"], trainer.args.device)
        metrics = trainer._metrics["train"]
        metrics.clear()
        metrics.update(state["metrics"])
        trainer._tr_loss = state["loss"].to(trainer.args.device)
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        self._restore_buffer(state, folder)
        self._at_step_start = state

    def _restore_buffer(self, state: dict[str, Any], folder: Path) -> None:
        trainer = self._trainer
        if "buffer" in state and state["division"] != self._division():
            raise ConfigError(
                f"{folder} is in the middle of a generation batch, divided into "
                f"{state['division'][0]} micro-batches for {state['division'][1]} steps: resume it with "
                "the same gradient_accumulation_steps and num_iterations"
            )
        names = list(trainer.teacher_names)
        if "buffer" in state and (before := state.get("teachers", names)) != names:
            raise ConfigError(
                f"{folder} is in the middle of a generation batch of the teachers "
                f"{', '.join(before) or 'without a name'}, and this run has "
                f"{', '.join(names) or 'one without a name'}: resume it with those, or from a checkpoint "
                "whose step ends a generation batch"
            )
        trainer._buffered_inputs = send_to_device(state.pop("buffer", None), trainer.args.device)

    def _division(self) -> list[int]:
        args = self._trainer.args
        return [args.gradient_accumulation_steps, args.num_iterations]

    def _take(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "random": _random_state(trainer.args.device),
            "callbacks": {name: each.checkpoint_state() for name, each in self._stateful()},
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "loss": trainer._tr_loss.detach().clone(),
            "last_logged": trainer._globalstep_last_logged,
            "tokens": trainer.state.num_input_tokens_seen,
        }

    def _stateful(self) -> Iterator[tuple[str, Stateful]]:
        seen: dict[str, int] = {}
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, Stateful):
                name = type(callback).__name__
                seen[name] = seen.get(name, -1) + 1
                yield f"{name}-{seen[name]}", callback

    # -- callback ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step_start, self.updating, self._savable = None, False, False
        # An earlier call of `train` may have ended in the middle of a step or of a generation batch. What a
        # checkpoint holds is restored later.
        trainer = self._trainer
        trainer._step = state.global_step * args.gradient_accumulation_steps
        trainer._buffered_inputs = None
        trainer._metrics["train"].clear()
        trainer._recorder.flush()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The data loader's iterator, made next, draws a number; a resumed epoch draws it again.
        self._at_step_start = self._take()
        loader = kwargs.get("train_dataloader")
        # Persistent workers' iterator is made once a process; a resumed run makes it in a later epoch.
        if getattr(getattr(loader, "base_dataloader", loader), "_iterator", None) is not None:
            torch.empty((), dtype=torch.int64).random_()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._at_step_start is None:
            self._at_step_start = self._take()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signals.hold()  # until all callbacks have seen the step's end: `AtomicCheckpoints`
        self.updating = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step_start, self.updating = None, False
        if (
            not self._savable
            and args.save_strategy != "no"
            and self._trainer.layout == "replicated"
        ):
            _refuse_unsavable(self._trainer.optimizer)
        self._savable = True


def _refuse_unsavable(optimizer: Any) -> None:
    """Refuse an optimizer whose state no checkpoint can hold: after one step, not at the first checkpoint."""
    try:
        check_tree(optimizer.state_dict())
    except DataError as error:
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise ConfigError(
            f"no checkpoint can be written: the state of the optimizer {kind} {error}; take another "
            "optimizer, or save_strategy='no' for a run that cannot be resumed"
        ) from error


def _random_state(device: torch.device) -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    inner = numpy["state"]
    state = {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
