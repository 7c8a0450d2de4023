"""The training set of a trainer: enough prompts for a generation batch, and a look at the first of them."""

import logging
from itertools import islice
from typing import Any

from datasets import IterableDataset
from torch.utils.data import Subset

from taopd.errors import DataError
from taopd.models.prompt_faults import LOOKED_AT, prompt_faults
from taopd.models.prompt_rows import TURNS

logger = logging.getLogger(__name__)


def first_rows(dataset: Any, count: int) -> list[Any]:
    """Up to `count` rows, of a stream too."""
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, count))
    return [dataset[row] for row in range(min(count, len(dataset)))]


def filled(dataset: Any, needed: int, *, drop_last: bool) -> Any:
    """The dataset, its prompts repeated where one generation batch needs more than there are.

    Args:
        needed: prompts of a generation batch, of all processes.
        drop_last: the setting `dataloader_drop_last`: nothing is repeated.

    Raises:
        DataError: no prompts, or fewer than needed in a stream or with `drop_last`.
    """
    # A stream's length shows only when it is read; its beginning is read once more in training.
    streams = isinstance(dataset, IterableDataset)
    number = len(first_rows(dataset, needed)) if streams else len(dataset)
    if not number:
        raise DataError("the training set has no prompts")
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
    """Log what is wrong with a training set's first rows; see `prompt_faults`.

    Raises:
        DataError: a row that is no prompt.
    """
    if rows and isinstance(rows[0], dict) and "prompt" not in rows[0]:
        turns = [name for name in TURNS if name in rows[0]]
        if not turns:
            raise DataError(f"the training set has no 'prompt' column, only {', '.join(rows[0])}")
        logger.warning("a prompt is what %r holds up to the last user turn", turns[0])
    for fault in prompt_faults(tokenizer, rows[:LOOKED_AT], **shown):
        logger.warning("prompts: %s", fault.text)
