"""Parquet files of numbers that somebody else may have written."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from taopd.errors import DataError
from taopd.runs.validation import shown

PLACES = ("prompt", "completion", "position", "token_id")
"""Columns that say where a row is; whole numbers wherever they occur."""


def read_table(
    path: Path, columns: Sequence[str] = (), *, only: bool = False, words: Sequence[str] = ()
) -> pd.DataFrame:
    """Every column of a Parquet file, all of them numbers but those in `words`.

    Args:
        columns: must be there.
        only: read no others.
        words: columns of text, where they occur.

    Raises:
        DataError: unreadable, a column is missing, or one holds anything but numbers.
    """
    try:
        table = pq.read_table(path, columns=list(columns) if only else None).to_pandas()
    except (OSError, ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}")
    for name in table:
        kind = table[name].dtype
        if name in words:
            table[name] = table[name].astype(str)
            continue
        whole = name in PLACES
        if kind.kind not in ("iu" if whole else "biuf"):
            what = "whole numbers" if whole else "numbers"
            raise DataError(f"{path}, column {shown(name)}: expected {what}, got {kind}")
    return table
