"""`taopd train --resume`: the checkpoint to resume from, the remaining training, and the saved student."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError, DataError, ResourceError
from taopd.runs.checkpoints import STATE, Layout
from taopd.runs.folder import MARKER, MODEL_FOLDER, MODEL_PARTIAL
from taopd.runs.schemas import TRAINER_STATE
from taopd.runs.validation import read_document
from taopd.trainer.checkpoint.failure import cannot_write
from taopd.trainer.checkpoint.mixin import agreed, replace_folder

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig
    from taopd.trainer.trainer import TeachabilityTrainer


logger = logging.getLogger(__name__)


def find(args: "TeachabilityConfig", path: Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from: `resume_from_checkpoint` if a path, else the newest complete one.

    The first process reads and checks it; all get its answer.

    Raises:
        ConfigError: a checkpoint is named without --resume.
        DataError: there is none, or the named one is incomplete.
    """
    named = args.resume_from_checkpoint
    by_name = isinstance(named, str) and named.lower() not in ("true", "false", "none", "")
    if by_name and not Path(str(named)).is_dir():
        raise DataError(f"resume_from_checkpoint: no such folder: {named}")
    if by_name and not resume:
        raise ConfigError(
            "resume_from_checkpoint needs --resume, which goes on with the run in output_dir"
        )
    if str(named).lower() == "true" and not resume:
        raise ConfigError("resume_from_checkpoint: true is written --resume here")
    if not resume:
        return None
    folder = Path(str(named)) if by_name else path
    checkpoint, problems = agreed(args, _layout(args), folder, newest=not by_name)
    if by_name and problems:
        raise DataError(f"resume_from_checkpoint: {problems[0]}")
    for line in problems if args.process_index == 0 else ():
        logger.warning("%s: %s", path, line)
    if checkpoint is None:
        raise DataError(
            f"nothing to resume: {path} has no complete checkpoint; start with --overwrite"
        )
    return checkpoint


def _layout(args: "TeachabilityConfig") -> Layout:
    """The layout that the trainer will have, from the settings and accelerate's environment."""

    def enabled(name: str) -> bool:
        launched = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
        return bool(launched or getattr(args, name.lower()))

    if enabled("DEEPSPEED"):
        return "deepspeed"
    return "sharded" if enabled("FSDP") else "replicated"


def is_finished(args: "TeachabilityConfig", path: Path, checkpoint: Path) -> bool:
    """Whether a run has done all its steps and written its results, which it does after the student."""
    done = _steps_done(checkpoint)
    if not 0 < args.max_steps <= done:
        return False
    try:
        return json.loads((path / "results.json").read_text(encoding="utf-8"))["steps"] == done
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train(trainer: "TeachabilityTrainer", checkpoint: Path | None) -> dict[str, Any]:
    """Closing metrics of the remaining training, if any."""
    trainer.checked = checkpoint
    return trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics


def save_student(trainer: "TeachabilityTrainer", path: Path) -> None:
    """Write the student to `<run>/model`, atomically."""
    partial = path / MODEL_PARTIAL
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save and partial.is_dir():
        replace_folder(partial, path / MODEL_FOLDER)


def disk_error(error: Exception, path: Path) -> ResourceError | None:
    """The error to show for a disk that cannot be written, None for another error."""
    what = cannot_write(error)
    if what is None:
        return None
    then = "go on with --resume" if (path / MARKER).exists() else "start again"
    return ResourceError(f"cannot write {what} in {path}. Make room or mend the folder, and {then}")


def _steps_done(checkpoint: Path) -> int:
    return int(read_document(checkpoint / STATE, TRAINER_STATE)["global_step"])
