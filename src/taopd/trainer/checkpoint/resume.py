"""`taopd train --resume`: which checkpoint, what is left to do, and a student that is saved whole."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from taopd.errors import ConfigError, DataError, ResourceError
from taopd.runs.checkpoints import STATE, Layout, problem_of
from taopd.runs.folder import MARKER, MODEL_FOLDER, MODEL_PARTIAL, RunFolder
from taopd.runs.schemas import TRAINER_STATE
from taopd.runs.validation import read_document
from taopd.trainer.checkpoint.failure import cannot_write
from taopd.trainer.checkpoint.mixin import replace_folder

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig
    from taopd.trainer.trainer import TeachabilityTrainer


def find(args: "TeachabilityConfig", path: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from: `resume_from_checkpoint` if a path, else the newest whole one.

    The first process reads and checks it; all get its answer.

    Raises:
        ConfigError: a checkpoint is named without --resume.
        DataError: there is none, or the named one is not whole.
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
    found: list[Any] = [None, None]
    if args.process_index == 0:
        layout = _layout(args)
        if by_name:
            found = [Path(str(named)), problem_of(Path(str(named)), layout)]
        else:
            found[0] = RunFolder(path=path).newest_checkpoint(layout)
    if args.world_size > 1:
        broadcast_object_list(found)
    checkpoint, problem = found
    if problem is not None:
        raise DataError(f"resume_from_checkpoint: {checkpoint}: {problem}")
    if checkpoint is None:
        raise DataError(
            f"nothing to resume: {path} has no complete checkpoint; start with --overwrite"
        )
    return checkpoint


def _layout(args: "TeachabilityConfig") -> Layout:
    """What the trainer will have, which is not made yet."""

    def asked(name: str) -> bool:
        launched = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
        return bool(launched or getattr(args, name.lower()))

    if asked("DEEPSPEED"):
        return "deepspeed"
    return "sharded" if asked("FSDP") else "replicated"


def is_finished(args: "TeachabilityConfig", path: Path, checkpoint: Path) -> bool:
    """Whether a run has done all its steps and has said so; its student is saved before it does."""
    done = _steps_done(checkpoint)
    if not 0 < args.max_steps <= done:
        return False
    try:
        return json.loads((path / "results.json").read_text(encoding="utf-8"))["steps"] == done
    except (OSError, ValueError, KeyError, TypeError):
        return False


def train(trainer: "TeachabilityTrainer", checkpoint: Path | None) -> dict[str, Any]:
    """Train what is left, if anything, and return the closing metrics."""
    if checkpoint is None:
        return trainer.train().metrics
    trainer.checked = checkpoint
    return trainer.train(resume_from_checkpoint=str(checkpoint)).metrics


def save_student(trainer: "TeachabilityTrainer", path: Path) -> None:
    """Write the student to `<run>/model`, whole or not at all."""
    partial = path / MODEL_PARTIAL
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save and partial.is_dir():
        replace_folder(partial, path / MODEL_FOLDER)


def disk_error(error: Exception, path: Path) -> ResourceError | None:
    """The message about a disk that takes no more, None for another error."""
    what = cannot_write(error)
    if what is None:
        return None
    then = "go on with --resume" if (path / MARKER).exists() else "start again"
    return ResourceError(f"cannot write {what} in {path}. Make room or mend the folder, and {then}")


def _steps_done(checkpoint: Path) -> int:
    return int(read_document(checkpoint / STATE, TRAINER_STATE)["global_step"])
