"""What is asked of a run that goes on: which checkpoint, and no fewer steps than it has done."""

from pathlib import Path
from typing import Any

from taopd.errors import ConfigError
from taopd.runs.checkpoints import STATE
from taopd.runs.schemas import TRAINER_STATE
from taopd.runs.validation import read_document


def named_folder(named: Any) -> Path:
    """The folder that `resume_from_checkpoint` names.

    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(named, str | Path):
        raise ConfigError(
            f"resume_from_checkpoint={named!r}: must be True, for the newest, or a checkpoint's folder"
        )
    return Path(named)


def steps_done(checkpoint: str | Path) -> int:
    """Optimizer steps of the run when the checkpoint was written."""
    return int(read_document(Path(checkpoint) / STATE, TRAINER_STATE)["global_step"])


def refuse_fewer(max_steps: int, checkpoint: str | Path | None) -> None:
    """Refuse to go on from a checkpoint beyond the steps that are asked for: nothing would be trained.

    Raises:
        ConfigError: with the number that the run has done.
    """
    if checkpoint is None or max_steps <= 0:  # what the epochs give
        return
    done = steps_done(checkpoint)
    if max_steps < done:
        raise ConfigError(
            f"max_steps={max_steps}: the run has done {done} already ({checkpoint}): ask for {done} or more, "
            "or start anew in another output_dir"
        )
