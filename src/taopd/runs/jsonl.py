"""JSON files of a run: documents that are written whole or not at all, and JSON lines.

Why atomic: a reader, or a run that is killed, never sees half a document. `append_jsonl` is the
exception, its last line may be cut by a crash, and `read_jsonl` leaves out an unfinished last line.
JSON has no NaN or infinity: non-finite floats become null.
"""

import dataclasses
import enum
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.runs.paths import with_usual_modes
from taopd.runs.validation import ANY, fit, parse_json, read_text


def write_json(path: str | Path, obj: Any) -> None:
    """Write one JSON document atomically: whole or not at all. Non-finite floats become null."""
    write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


_ODD = "backslashreplace"
"""Half a surrogate pair, as in the name of a folder that is no text in this locale: JSON reads it again."""


def write_text(path: str | Path, text: str | Iterable[str]) -> None:
    """Write a text file, whole or in pieces, atomically: all of it or nothing."""
    path = Path(path)
    try:
        _replace_text(path, [text] if isinstance(text, str) else text)
    except OSError as error:  # which names the temporary file, or none
        _name(error, path)
        raise


def _name(error: OSError, path: str | Path) -> None:
    if error.errno is not None:  # without a number the words are Python's, and would be lost
        error.filename = str(path)


def _replace_text(path: Path, parts: Iterable[str]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors=_ODD) as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        with_usual_modes(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON document a line, atomically. Non-finite floats become null."""
    write_text(path, map(_line, rows))


def append_jsonl(path: str | Path, *documents: Any) -> None:
    """Append JSON documents, a line each, and flush them. Non-finite floats become null.

    What cannot be written in full (a full disk) is taken back before the error goes on.

    Raises:
        DataError: the path is a symbolic link, which would lead out of the run folder.
    """
    if os.path.islink(path):
        raise DataError(f"{path} is a symbolic link: a run writes into its own folder only")
    rest = "".join(map(_line, documents)).encode("utf-8")
    with open(path, "ab", buffering=0) as stream:  # a buffer would be written again on closing
        before = stream.tell()
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except OSError as error:
            os.truncate(path, before)
            _name(error, path)
            raise


def read_jsonl(path: str | Path, shape: Any = ANY) -> list[Any]:
    """Return the documents of a JSON-lines file; an unfinished last line (a crash) is left out.

    Args:
        shape: of every line; see `taopd.runs.validation`.

    Raises:
        DataError: the file is missing or no text, or a line that ends is not JSON or has another shape.
    """
    lines = read_text(Path(path), torn=True).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        place = f"{path}, line {number}"
        try:
            row = parse_json(line, place)
        except DataError:
            if number < len(lines):
                raise
            continue
        fit(row, shape, place)
        rows.append(row)
    return rows


def rewind_jsonl(path: str | Path, step: int) -> None:
    """Keep the lines of a log whose "step" is below `step`, so that a resumed run goes on from there.

    A line torn by a kill ends what is kept: everything after it is newer than any checkpoint. Without
    a file there is nothing to do.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in _lines(path):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    write_text(path, (f"{line.decode()}\n" for line in kept))


def cut_lines(path: str | Path, num_lines: int) -> None:
    """Keep the first lines of a log, for a run that goes on from there; without a file nothing is done."""
    path = Path(path)
    if path.exists():
        write_text(path, (f"{line.decode()}\n" for line in _lines(path)[:num_lines]))


def thin_jsonl(path: str | Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the lines of a log for which `is_kept` is true of the document; written whole."""
    with open(path, encoding="utf-8") as stream:
        write_text(path, (line for line in stream if is_kept(json.loads(line))))


def _lines(path: Path) -> list[bytes]:
    """The lines of a log, cut at newlines alone: text of a model's holds other separators (U+2028, U+0085).

    As bytes, as a kill may tear the last one within a character.
    """
    return [line for line in path.read_bytes().split(b"\n") if line]


def _line(obj: Any) -> str:
    return json.dumps(plain(obj), ensure_ascii=False, allow_nan=False) + "\n"


def plain(obj: Any) -> Any:
    """JSON's own types: dataclasses become objects, sets sorted lists, arrays lists."""
    if isinstance(obj, enum.Enum):
        return plain(obj.value)
    if obj is None or isinstance(obj, (str, bool, int)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return plain({field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)})
    if isinstance(obj, dict):
        return {str(plain(key)): plain(value) for key, value in obj.items()}
    if isinstance(obj, (set, frozenset)):
        return sorted((plain(item) for item in obj), key=str)
    if isinstance(obj, (list, tuple)):
        return [plain(item) for item in obj]
    if hasattr(obj, "tolist"):
        return plain(obj.tolist())
    return str(obj)
