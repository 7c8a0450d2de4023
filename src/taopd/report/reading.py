"""Files of a run folder, read with one clear error for each way in which they can be broken.

A last line that a kill cut short is no error: it is left out, and `is_torn` says so.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from taopd.errors import DataError
from taopd.records import read_jsonl


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is missing or holds something else.

    Raises:
        DataError: the file is there and cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it is missing.

    Raises:
        DataError: a line other than the last is not JSON, or one is not an object.
    """
    if not path.is_file():
        return []
    lines = read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict):
            raise DataError(f"{path}, line {number}: not an object; no taopd run wrote this")
    return lines


def is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end: its writer was killed, or is writing."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A parquet file.

    Raises:
        DataError: it is missing or damaged, or lacks a column.
    """
    try:
        return pd.read_parquet(path, columns=None if columns is None else list(columns))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
