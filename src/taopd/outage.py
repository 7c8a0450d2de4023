"""Stopping in mid-step because the teacher stays away, so that `--resume` loses no step and draws no other.

When the teacher is asked, the step's completions are sampled already. A checkpoint with the random streams of
that moment would sample others on resuming; so those from before the sampling are put back first.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taopd.errors import TeacherError


class Outage:
    """Remembers the random streams of the last step's end; writes the checkpoint."""

    def __init__(self) -> None:
        self._streams = _streams()

    def before_sampling(self) -> None:
        """A generation batch is about to be sampled."""
        self._streams = _streams()

    def stop(self, trainer: Any, error: TeacherError) -> TeacherError:
        """Save the steps that are done, unless they are; returns the error that says where they are."""
        step = trainer.state.global_step
        if step == 0:
            return error
        path = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        if not (path / "trainer_state.json").exists():  # what transformers writes last
            _put_back(*self._streams)
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        return type(error)(f"{error}. {step} steps are saved in {path}: go on with --resume")


def _streams() -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _put_back(python: Any, numpy: Any, cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
