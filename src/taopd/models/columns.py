"""Rows of a set of prompts, a batch at a time, with the columns that somebody reads and no others."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

BATCH = 1000
"""Rows of a table that are read together: one by itself takes twenty times as long."""


def batches(
    rows: Any, columns: Sequence[str], numbers: Sequence[int] | None = None
) -> Iterator[list[Any]]:
    """The rows in order: a mapping of the columns that a row has, or a bare prompt as it is.

    Args:
        rows: a `datasets.Dataset`, or what has a length and is indexed, as torch takes it.
        numbers: which of them; None: all.
    """
    if not isinstance(rows, Dataset):
        numbers = range(len(rows)) if numbers is None else numbers
        for start in range(0, len(numbers), BATCH):
            yield [_of(rows[number], columns) for number in numbers[start : start + BATCH]]
        return
    part = rows.with_format(None)
    part = part if numbers is None else part.select(numbers)
    part = part.select_columns([name for name in columns if name in rows.column_names])
    for batch in part.iter(batch_size=BATCH):
        size = len(next(iter(batch.values()), ()))
        yield [{name: batch[name][at] for name in batch} for at in range(size)]


def _of(row: Any, columns: Sequence[str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    return {name: row[name] for name in columns if name in row}
