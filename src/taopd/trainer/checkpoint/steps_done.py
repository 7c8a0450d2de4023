"""What is asked of a run that goes on: which checkpoint, and no fewer steps than it has done."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from taopd.errors import ConfigError
from taopd.runs.checkpoints import STATE
from taopd.runs.schemas import TRAINER_STATE
from taopd.runs.validation import read_document


def named_folder(named: Any) -> Path:
    """The folder that `resume_from_checkpoint` names."""
    if not isinstance(named, str | Path):
        raise ConfigError(
            f"resume_from_checkpoint={named!r}: must be True, for the newest, or a checkpoint's folder"
        )
    return Path(named)


def steps_done(checkpoint: str | Path) -> int:
    """Optimizer steps of the run when the checkpoint was written."""
    return int(read_document(Path(checkpoint) / STATE, TRAINER_STATE)["global_step"])


def refuse_fewer(args: TrainingArguments, checkpoint: str | Path | None) -> str:
    """Refuse to go on from a checkpoint beyond the steps that are asked for: nothing would be trained.

    Returns:
        The setting that gives their number, where the run has done exactly so many; else "".
    """
    if checkpoint is None:
        return ""
    state = read_document(Path(checkpoint) / STATE, TRAINER_STATE)
    name, done = "max_steps", state["global_step"]
    asked, words = args.max_steps, str(done)
    if asked <= 0:
        if not (epochs := state.get("epoch")):
            return ""
        name, words = "num_train_epochs", f"{epochs:g}"
        # As transformers counts: the last epoch may be a part of one.
        asked = math.ceil(args.num_train_epochs * round(done / epochs))
    if asked < done:
        raise ConfigError(
            f"{name}={getattr(args, name)}: the run has done {words} already ({checkpoint}): ask for {words} "
            "or more, or start anew in another output_dir"
        )
    return name if asked == done else ""
