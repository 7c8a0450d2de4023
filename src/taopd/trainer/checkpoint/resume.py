"""`taopd train --resume`: the checkpoint to resume from, the remaining training, and the saved student."""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError, DataError, ResourceError
from taopd.runs.checkpoints import Layout, checkpoints
from taopd.runs.disk import cannot_write
from taopd.runs.folder import MARKER, MODEL_FOLDER, MODEL_PARTIAL
from taopd.runs.jsonl import plain
from taopd.runs.paths import replace_folder
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document, shown
from taopd.trainer.checkpoint.mixin import agreed
from taopd.trainer.checkpoint.steps_done import refuse_fewer, steps_done
from taopd.trainer.settings.teacher_entries import same_teachers

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig
    from taopd.trainer.trainer import TeachabilityTrainer


_DIVISION = {"per_device_train_batch_size", "gradient_accumulation_steps"}
"""Divide a batch; their product is the method's."""
_OF_A_START = {
    *("output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "local_rank", "debug"),
}
"""Of one start of a run, or of the machine."""
_FREE = {
    *("max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit"),
    *("save_on_each_node", "save_only_model", "hub_model_id", "report_to", "project"),
    *("trackio_space_id", "log_level", "log_level_replica", "logging_steps", "logging_strategy"),
    *("logging_first_step", "log_rollouts", "log_selection", "log_completions"),
    *("num_completions_to_print", "log_update_norm", "disable_tqdm", "skip_memory_metrics"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "ddp_backend", "ddp_bucket_cap_mb", "ddp_timeout"),
    *("teacher_url", "teacher_server", "teacher_concurrency", "teacher_timeout_s"),
    *("teacher_patience_s", "on_bad_numbers", "max_skipped_steps", "collapse_guard", "guard_every"),
    *("gather_limit", "prefix_memory_mib", "torch_empty_cache_steps", "use_cpu"),
    *("gradient_check_every", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "shadow_selectors"),
    *("dataloader_multiprocessing_context", "log_unique_prompts"),
}
"""Settings that change what is written, how fast, how long or where, and not what is trained."""

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
        how = "with --overwrite" if any(path.glob("*")) else "without --resume"
        raise DataError(f"nothing to resume: {path} has no complete checkpoint; start {how}")
    return checkpoint


def _layout(args: "TeachabilityConfig") -> Layout:
    """The layout that the trainer will have, from the settings and accelerate's environment."""

    def enabled(name: str) -> bool:
        launched = os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
        return bool(launched or getattr(args, name.lower()))

    if enabled("DEEPSPEED"):
        return "deepspeed"
    return "sharded" if enabled("FSDP") else "replicated"


def changed_settings(
    path: Path, step: int, now: dict[str, Any], *, allowed: bool
) -> list[dict[str, Any]]:
    """What `config.json` keeps under "changes": settings that resumes changed, each with its step.

    Args:
        path: of the run, whose `config.json` says how it began; step: from which it goes on.
        now: the settings of this start.
        allowed: changes of the method as well (`--resume-with-changes`).

    Raises:
        ConfigError: settings that change the method differ; lists all that differ.
    """
    try:
        before = read_document(path / "config.json", {"changes?": [OBJECT]})
    except DataError:
        logger.warning("%s: no settings of the run so far: what changed cannot be said", path)
        return []
    # As the file has them: tuples and paths would differ from what JSON made of them.
    now = json.loads(json.dumps(plain(now)))
    found = {
        name: {"before": before[name], "after": value}
        for name, value in now.items()
        if name in before and name not in _OF_A_START and not _same(name, before[name], value)
    }
    if not found:
        return list(before.get("changes", []))
    free = _FREE | (_DIVISION if _same_batch(before, now) else set())
    words = {n: "; ".join(_differences(n, v["before"], v["after"])) for n, v in found.items()}
    if "teachers" in found and same_teachers(*found["teachers"].values()):
        free |= {"teachers"}
    method = [words[name] for name in found if name not in free]
    if method and not allowed:
        raise ConfigError(
            f"the run in {path} began with other settings ({'; '.join(method)}): resume it with those, "
            "start anew in another folder, or accept the change from this step on with "
            "--resume-with-changes"
        )
    logger.warning("%s: settings change at step %d: %s", path, step, "; ".join(words.values()))
    return [*before.get("changes", []), {"step": step, "settings": found}]


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether two values of a setting say the same: empty is as good as None, a weight of 1 as no entry."""
    if name == "teacher_weights":
        before, now = (
            {teacher: weight for teacher, weight in (value or {}).items() if weight != 1}
            for value in (before, now)
        )
    empty: tuple[Any, ...] = ({}, [], None)
    return before == now or (before in empty and now in empty)


def _differences(name: str, before: Any, after: Any) -> Iterator[str]:
    """What differs between two values of a setting, of a mapping or list each entry by its path."""
    parts = [_entries(value) for value in (before, after)]
    if not any(parts):
        yield f"{name} {shown(before)} -> {shown(after)}"
        return
    for key in dict.fromkeys([*parts[0], *parts[1]]):
        one, other = (part.get(key) for part in parts)
        if one != other:
            yield from _differences(f"{name}.{key}", one, other)


def _entries(value: Any) -> dict[Any, Any]:
    if isinstance(value, list):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {}


def _same_batch(before: dict[str, Any], now: dict[str, Any]) -> bool:
    one, other = (
        math.prod(int(each.get(name) or 1) for name in _DIVISION) for each in (before, now)
    )
    return one == other


def finished(args: "TeachabilityConfig", path: Path, checkpoint: Path) -> str:
    """In words that a run has done all that is asked for, and written its results; "" where it has not."""
    name, done = refuse_fewer(args, checkpoint), steps_done(checkpoint)
    if not name:
        return ""
    try:  # the results come after the student
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        written = results["steps"] == done
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"has done its {done} steps; a larger {name} goes on from there" if written else ""


def train(trainer: "TeachabilityTrainer", checkpoint: Path | None) -> dict[str, Any]:
    """Closing metrics of the remaining training, if any."""
    trainer.checked = checkpoint
    # The command looks and writes the run's files itself: it knows the settings of the models too.
    trainer.writes_record = False
    named = checkpoint and str(checkpoint)
    return trainer.train(resume_from_checkpoint=named, check=False).metrics


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
    begun = "start anew with --overwrite" if (path / MARKER).exists() else "start again"
    then = "go on with --resume" if checkpoints(path) else begun
    return ResourceError(f"cannot write {what} in {path}. Make room or mend the folder, and {then}")
