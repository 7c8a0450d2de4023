"""Files of a run folder that may be missing or cut short; what is there has the shape it should have.

A last line that a kill cut short is no error: it is left out, and `is_torn` says so.
"""

import os
from pathlib import Path
from typing import Any

from taopd.runs.jsonl import read_jsonl
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document


def read_json(path: Path, shape: Any = OBJECT) -> dict[str, Any]:
    """A JSON object of a given shape, empty if the file is missing.

    Raises:
        DataError: the file is there and cannot be read, or has another shape.
    """
    return read_document(path, shape) if path.is_file() else {}


def read_lines(path: Path, shape: Any = OBJECT) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it is missing.

    Raises:
        DataError: a line other than the last is not JSON, or one has another shape.
    """
    return read_jsonl(path, shape) if path.is_file() else []


def is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end: its writer was killed, or is writing."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
