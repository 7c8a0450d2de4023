"""Dataset files, read so that prompts and answers are the text that they hold.

What: `read_file` gives the rows of a .parquet, .jsonl, .json or .csv file; `read_folder` those of a folder.

Why not the readers of `datasets` alone: they take the answer 007 of a CSV for 7, a date in JSON lines for a
time (2020-05-10 00:00:00, which no completion says), 25! for 1.55e+25, and the [1] in a file's name for a
pattern, which may match another file.
"""

import glob
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from taopd.errors import DataError, ResourceError, root_error
from taopd.models.loading import DATASET_READERS
from taopd.models.prompt_rows import TURNS
from taopd.runs.disk import is_full
from taopd.runs.validation import keys_once

logger = logging.getLogger(__name__)

_AS_WRITTEN = ("prompt", "answer")
# An empty cell is null; NA, None and nan are words.
_CSV_AS_TEXT: dict[str, Any] = {
    "converters": dict.fromkeys(_AS_WRITTEN, str),
    "keep_default_na": False,
    "na_values": [""],
}
_READ = ("prompt", *TURNS, "tools", "chat_template_kwargs", "answer", "split", "teacher_prompt")
"""Columns that are read where a table has them: under nearly the same name they would be passed over."""
_OLD = "__as_read__"
_UNNAMED = "__index_level_0__"
"""What pandas calls a first column that the header does not name."""
_ROWS = (".parquet", ".jsonl", ".csv")
_SPACE = re.compile(r"\s*")
_NUMBERS_AS_TEXT = json.JSONDecoder(parse_int=str, parse_float=str)


def read_file(path: Path) -> datasets.Dataset:
    """The rows of a file; its reader's errors pass through.

    Raises:
        DataError: columns that were not told apart, or JSON that is one object of columns.
    """
    reader = DATASET_READERS[path.suffix.lower()]
    options = _CSV_AS_TEXT if reader == "csv" else {}
    try:
        rows = datasets.load_dataset(
            reader, data_files=glob.escape(str(path)), split="train", **options
        )
    except datasets.exceptions.DatasetGenerationError:
        # The reader decides by the first 10 MB of JSON what a column holds: 1, 2 and later 2.5 or "two".
        if reader == "json" and (found := _row_by_row(path)) is not None:
            return found
        raise
    _check_columns(path, rows.column_names)
    if reader == "json":
        _check_one_object(path, rows)
        return _as_written(path, rows)
    return rows


def read_folder(path: Path) -> datasets.DatasetDict:
    """The splits of a folder of loose files, each file as `read_file` reads it; its errors pass through.

    Raises:
        DataError: the reader would take the folder's name for a pattern.
    """
    if glob.has_magic(str(path.resolve())):
        raise DataError(
            f"the dataset folder {path} has one of *, ? and [ in its path, which is a pattern to its reader: "
            "rename the folder, or name a file in it"
        )
    splits: dict[str, list[str]] = datasets.load_dataset_builder(str(path)).config.data_files or {}
    suffixes = {Path(file).suffix for files in splits.values() for file in files}
    kinds = {DATASET_READERS.get(suffix) for suffix in suffixes}
    # Which kind is read is the reader's choice. A .json file beside the data describes it.
    passed_over = [
        file.name
        for file in path.rglob("*")
        if file.suffix in _ROWS and file.suffix not in suffixes
    ]
    if passed_over and suffixes:
        logger.warning(
            "dataset folder %s: only its %s files are read, not %s: name a file, or make one kind of them",
            *(path, " and ".join(sorted(suffixes)), ", ".join(sorted(passed_over)[:3])),
        )
    if not kinds <= {"json", "csv"}:
        return datasets.load_dataset(str(path))
    return datasets.DatasetDict(
        {
            str(split): datasets.concatenate_datasets([read_file(Path(file)) for file in files])
            for split, files in splits.items()
        }
    )


def refuse_cache(error: BaseException) -> None:
    """Raise where the system refused a file of the library's cache, which every dataset is copied to.

    Raises:
        ResourceError: says where the cache is.
    """
    error = root_error(error)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if not isinstance(error, OSError):
        return
    refused = Path(os.fsdecode(error.filename or "."))
    if is_full(error) or refused in (cache, *cache.parents) or cache in refused.parents:
        raise ResourceError(
            f"datasets are copied to the cache {cache}, which cannot be written ({error.strerror}): make "
            "room or mend the folder, or name another one with the variable HF_DATASETS_CACHE"
        ) from error


def check_names(path: Path, names: list[str]) -> None:
    """Refuse a column whose name is that of one that is read but for capital letters and spaces.

    Raises:
        DataError: names both.
    """
    for name in names:
        meant = name.strip().lower()
        if meant != name and meant in _READ and meant not in names:
            raise DataError(
                f"{path} has a column {name!r}, and {meant!r} is what is read: write its name without "
                "capital letters and spaces, or rename it if it means something else"
            )


def _check_columns(path: Path, names: list[str]) -> None:
    """Refuse a table whose columns were not told apart as they are meant.

    Raises:
        DataError: says how to write it.
    """
    if _UNNAMED in names:
        raise DataError(
            f"{path} has more cells in a row than names in its header ({', '.join(names[:-1])}): put a text "
            "that holds a comma between double quotes"
        )
    if twice := [name for name in _READ if f"{name}.1" in names and path.suffix.lower() == ".csv"]:
        raise DataError(f"{path} has two columns {twice[0]!r}: rename or drop one of them")
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{path} has {called} between its columns: save it with commas")


def _check_one_object(path: Path, rows: datasets.Dataset) -> None:
    """Refuse a JSON file that is one object of columns, as pandas writes it: its reader takes it for a row.

    Raises:
        DataError: says how to write it.
    """
    if path.suffix.lower() != ".json" or len(rows) != 1:
        return
    row = rows[0]
    messages = [row.get(name) for name in ("prompt", *TURNS)]
    if all(isinstance(value, list | dict) for value in row.values()) and not any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in messages
    ):
        raise DataError(
            f"{path} is one object with {', '.join(list(row)[:3])}, and must be a list of objects, one for "
            "each row; pandas writes it with to_json(orient='records')"
        )


def _as_written(path: Path, rows: datasets.Dataset) -> datasets.Dataset:
    """With prompts and answers, and all that was taken for a time, as text where they are no text yet."""
    changed = [
        name
        for name, kind in rows.features.items()
        if isinstance(kind, datasets.Value | datasets.Json)
        and "string" not in (held := str(getattr(kind, "dtype", "")))
        and (name in _AS_WRITTEN or "timestamp" in held)
    ]
    if not changed:
        return rows
    # What is no UTF-8 is named later, with its row.
    written = _objects(path.read_text(encoding="utf-8-sig", errors="replace"))
    for name in changed if len(written) == len(rows) else ():
        # NaN is null here: neither is an answer.
        values = [None if (v := one.get(name)) != v else v for one in written]
        if any(isinstance(value, list | dict) for value in values):
            continue
        texts = [None if value is None else _text(value) for value in values]
        rows = with_values(rows, name, texts)
    return rows


def with_values(rows: datasets.Dataset, name: str, values: list[Any]) -> datasets.Dataset:
    """With other values in a column, which may be of another type."""
    # Renamed first: a table without a column has no rows to add one to.
    return rows.rename_column(name, _OLD).add_column(name, values).remove_columns(_OLD)


def _row_by_row(path: Path) -> datasets.Dataset | None:
    """The rows with prompts and answers as text; None where that is not what cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _objects(text, json.JSONDecoder(object_pairs_hook=keys_once))
        written = _objects(text)
        for row, texts in zip(rows, written, strict=True):
            for name in _AS_WRITTEN:
                if isinstance(value := row.get(name), int | float):
                    row[name] = _text(texts[name]) if value == value else None
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, AttributeError, pyarrow.ArrowException):
        return None


def _text(value: Any) -> str:
    """A value of JSON as the file has it; numbers are their text already."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _objects(text: str, decoder: json.JSONDecoder = _NUMBERS_AS_TEXT) -> list[dict[str, Any]]:
    """The rows of a JSON file, one a line or all in a list."""
    found: list[Any] = []
    place = _SPACE.match(text, 0).end()  # type: ignore[union-attr]
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        found += value if isinstance(value, list) else [value]
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
    return found
