"""Whether a resumed run has the teachers and the prompts that it began with.

Settings are compared by `taopd train --resume`. They do not tell that a model's folder or a file of prompts
was written over under its name, or that a caller in Python gives other objects.

Of a teacher here a few weights of every parameter are kept in a checkpoint, as `same_start` keeps those of
the student; of the prompts a digest of what is read of each row.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import TrainerCallback

from taopd.errors import ConfigError
from taopd.models.columns import batches
from taopd.models.prompt_rows import COLUMNS
from taopd.trainer.checkpoint.same_start import differ

MOST_ROWS = 100_000
"""Rows of a digest, evenly spaced where there are more: about a second."""

logger = logging.getLogger(__name__)


class SameInputs(TrainerCallback):
    """Keeps in checkpoints what the teachers and prompts are, and compares where a run is resumed.

    Args:
        trainer: a `TeachabilityTrainer` that has its teachers.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @cached_property
    def _prompts(self) -> dict[str, Any] | None:
        """The digest of the training set. Kept: a checkpoint's state is asked for at every step."""
        trainer = self._trainer
        own = (trainer.args.teacher_column,) if trainer.teacher_names else ()
        columns = (*COLUMNS, *own, *trainer.teacher_prompt_columns)
        return digest(trainer.train_dataset, columns)

    def checkpoint_state(self) -> dict[str, Any] | None:
        """Of the teachers by name and of the prompts; None but on the first process."""
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return None
        names = trainer.teacher_names or ("",)
        teachers = {name: _of_teacher(trainer.teacher_source(name)) for name in names}
        return {"teachers": teachers, "prompts": self._prompts}

    def load_checkpoint_state(self, state: dict[str, Any] | None) -> None:
        """Compare; what differs is an error where the settings were compared, and a warning elsewhere.

        Raises:
            ConfigError: on every process, unless the trainer `accepts_changes`.
        """
        trainer, found = self._trainer, [""]
        now = self.checkpoint_state()
        if state is not None and now is not None:
            found = ["; ".join(_differences(trainer, state, now))]
        if trainer.accelerator.num_processes > 1:
            # One process has looked; all stop, or none.
            broadcast_object_list(found)
        if not found[0]:
            return
        if trainer.accepts_changes:
            logger.warning("the run goes on with other inputs than it began with: %s", found[0])
            return
        raise ConfigError(
            f"the run began with other inputs: {found[0]}. Resume it with those, start anew in another "
            "folder, or accept the change from this step on with --resume-with-changes"
        )


def digest(rows: Any, columns: Iterable[str]) -> dict[str, Any] | None:
    """Number of rows and SHA-256 of what these columns hold; None of a stream, whose end is not known."""
    if rows is None or isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        return None
    total, found = len(rows), hashlib.sha256()
    step = max(1, -(-total // MOST_ROWS))
    every = batches(rows, tuple(dict.fromkeys(columns)), range(0, total, step))
    for row in itertools.chain.from_iterable(every):
        if isinstance(row, dict):
            # A table fills a column that a row lacks with nulls.
            row = {name: value for name, value in row.items() if value is not None}
        # An object of no plain kind has no text that two processes share but the name of its type.
        text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
        found.update(text.encode() + b"\n")
    return {"rows": total, "sha256": found.hexdigest()}


def _of_teacher(source: Any) -> dict[str, Any]:
    """Where a teacher is, its name, and samples of its weights if they are here as they were loaded."""
    if source.remote is not None:
        return {"kind": "a teacher outside of this process", "asked": source.probe.asked}
    name = str(getattr(source.plain, "name_or_path", "") or "")
    return {"kind": "a model in this process", "name": name, "samples": source.samples}


def _changed(source: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, how a teacher differs from the one of that name before; "" if it does not."""
    if before["kind"] != now["kind"]:
        return f"was {before['kind']} and is {now['kind']}"
    if "samples" not in now:
        words = source.probe.answers_otherwise(before["asked"]) if before["asked"] else ""
        return words and f"is asked again: {words}"
    if before["samples"] is None or now["samples"] is None:
        return ""
    if not differ(torch.tensor(before["samples"]), torch.tensor(now["samples"])):
        return ""
    where = f" ({now['name']})" if now["name"] else ""
    return f"has other weights than at the start{where}"


def _differences(trainer: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is another than it was, in words."""
    old, new = before["teachers"], now["teachers"]
    if set(old) != set(new):
        names = [
            ", ".join(sorted(filter(None, each))) or "one without a name" for each in (old, new)
        ]
        yield f"the teachers were {names[0]} and are {names[1]}"
    for name in sorted(set(old) & set(new)):
        if words := _changed(trainer.teacher_source(name), old[name], new[name]):
            yield f"teacher {name!r} {words}" if name else f"the teacher {words}"
    if before["prompts"] is None or now["prompts"] is None:
        return
    if before["prompts"]["rows"] != now["prompts"]["rows"]:
        rows = before["prompts"]["rows"], now["prompts"]["rows"]
        yield f"the training set had {rows[0]} rows and has {rows[1]}"
    elif before["prompts"] != now["prompts"]:
        yield "the training set holds other prompts, or other values in the columns beside them"
