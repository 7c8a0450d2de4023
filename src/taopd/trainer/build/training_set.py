"""The training set of a trainer: enough prompts for a generation batch, and a look at the first of them."""

import logging
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import DatasetDict, IterableDataset
from torch.utils.data import Subset

from taopd.errors import ConfigError, DataError
from taopd.models.prompt_faults import LOOKED_AT, faults_of_ends, faults_of_kinds, prompt_faults
from taopd.models.prompt_rows import TURNS, read_prompt
from taopd.models.teacher_prompts import COLUMN, TeacherPrompts
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

logger = logging.getLogger(__name__)


def first_rows(dataset: Any, count: int) -> list[Any]:
    """Up to `count` rows, of a stream too."""
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, count))
    return [dataset[row] for row in range(min(count, len(dataset)))]


def columns_of(dataset: Any) -> list[str]:
    """Columns that any of the first rows has: a list's rows may differ."""
    rows = (row for row in first_rows(dataset, LOOKED_AT) if isinstance(row, Mapping))
    return list(dict.fromkeys(name for row in rows for name in row))


def evaluation_sets(given: Any) -> dict[str, Any]:
    """The evaluation sets, one or several by name, by what a message calls them; none of None."""
    several = given if isinstance(given, dict) else {"": given}
    named = {f"the evaluation set {name}".rstrip(): rows for name, rows in several.items()}
    return {where: rows for where, rows in named.items() if rows is not None}


def require_rows(dataset: Any, where: str) -> None:
    """Refuse what is no set of rows, each a mapping, where the first of them is read."""
    kind = type(dataset).__name__
    readable = hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    if isinstance(dataset, str | os.PathLike | Mapping) or not readable:
        how = "taopd.load_prompts reads a file, a folder or a hub id"
        if isinstance(dataset, DatasetDict):
            how = f"take one split of it: {', '.join(map(repr, dataset))}"
        raise DataError(f"{where} is a {kind}, no dataset: {how}")
    try:
        rows = first_rows(dataset, 1)
    except (KeyError, TypeError) as error:  # a table of another library
        raise DataError(
            f"{where} is a {kind}, which gives no rows: pass a dataset, or a list of mappings with 'prompt'"
        ) from error
    if not rows:
        raise DataError(f"{where} has no prompts")
    if not isinstance(rows[0], Mapping):
        found = type(rows[0]).__name__
        raise DataError(f"{where}: row 0 is a {found}; a row is a mapping with 'prompt'")
    if not any(name in rows[0] for name in ("prompt", *TURNS)):
        raise DataError(f"{where} has no 'prompt' column, only {', '.join(rows[0])}")


def filled(dataset: Any, needed: int, *, drop_last: bool) -> Any:
    """The dataset, its prompts repeated where one generation batch needs more than there are.

    Args:
        needed: prompts of a generation batch, of all processes.
        drop_last: the setting `dataloader_drop_last`: nothing is repeated.
    """
    # A stream's length shows only when it is read; its beginning is read once more in training.
    streams = isinstance(dataset, IterableDataset)
    number = len(first_rows(dataset, needed)) if streams else len(dataset)
    if number >= needed:
        return dataset
    # TRL drops an incomplete generation batch: the run would end without a step and save the student.
    few = f"the training set has {number} prompts, one generation batch takes {needed}"
    if streams or drop_last:
        raise DataError(
            f"{few}: add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    logger.warning("%s: prompts are repeated to fill it", few)
    rows = [row % number for row in range(needed)]
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


def warn_of_faults(rows: list[Any], tokenizer: Any, **shown: Any) -> None:
    """Log what is wrong with a training set's first rows; see `prompt_faults`."""
    if "prompt" not in rows[0]:
        turns = [name for name in TURNS if name in rows[0]]
        logger.warning("a prompt is what %r holds up to the last user turn", turns[0])
    for fault in prompt_faults(tokenizer, rows, **shown):
        logger.warning("prompts: %s", fault.text)


TEACHER_BEGUN = "the teacher would score the completion as what comes after it"
"""What a teacher's prompt that ends inside the assistant's turn leads to."""


def check_teacher_prompts(
    prompts: TeacherPrompts,
    dataset: Any,
    evaluation: Mapping[str, Any],
    tokenizer: Any,
    teacher: str | None,
    **shown: Any,
) -> None:
    """Refuse sets without what the teacher's prompts are made of; log what is wrong with the first rows.

    Args:
        evaluation: see `evaluation_sets`.
        teacher: as the settings name it.
        shown: see `faults_of_ends`.
    """
    columns = columns_of(dataset)
    if not prompts.used(columns):
        if teacher in OWN_TEACHERS:
            raise ConfigError(
                f"teacher_model_name_or_path={teacher!r} without a prompt of the teacher's own: it would be "
                "the student itself, and nothing could be learned. Set teacher_prompt_template, or add a "
                f"column {COLUMN!r} to the prompts"
            )
        return
    prompts.check(columns, "the training set")
    for where, others in evaluation.items():
        prompts.check(columns_of(others), where)
    rows = first_rows(dataset, LOOKED_AT)
    found = prompts.of_rows(rows) or []
    faults = faults_of_ends(tokenizer, found, begun=TEACHER_BEGUN, **shown)
    students = [read_prompt(row, f"row {number}") for number, row in enumerate(rows)]
    look = {name: shown[name] for name in ("template", "stop_ids") if name in shown}
    for fault in faults + faults_of_kinds(tokenizer, students, found, **look):
        logger.warning("teacher prompts: %s", fault.text)
