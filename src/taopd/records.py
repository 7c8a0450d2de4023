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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taopd.errors import DataError


def write_json(path: str | Path, obj: Any) -> None:
    """Write one JSON document atomically: whole or not at all. Non-finite floats become null."""
    _replace(
        Path(path), json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: whole or not at all."""
    _replace(Path(path), text)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON document a line, atomically. Non-finite floats become null."""
    _replace(Path(path), "".join(_line(row) for row in rows))


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Append one JSON document as one line and flush it. Non-finite floats become null.

    What cannot be written in full (a full disk) is taken back before the error goes on.
    """
    with open(path, "ab") as stream:
        before = stream.tell()
        try:
            stream.write(_line(obj).encode("utf-8"))
            stream.flush()
        except OSError:
            os.truncate(path, before)
            raise


def read_jsonl(path: str | Path) -> list[Any]:
    """Return the documents of a JSON-lines file; an unfinished last line (a crash) is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is not JSON.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
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
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError):
            break
    _replace(path, "".join(f"{line}\n" for line in kept))


def cut_lines(path: str | Path, num_lines: int) -> None:
    """Keep the first lines of a log, for a run that goes on from there; without a file nothing is done."""
    path = Path(path)
    if path.exists():
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_lines]
        _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives 0600; a result is as readable as any other file the user writes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _line(obj: Any) -> str:
    return json.dumps(_plain(obj), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(obj: Any) -> Any:
    """JSON's own types: dataclasses become objects, sets sorted lists, arrays lists."""
    if isinstance(obj, enum.Enum):
        return _plain(obj.value)
    if obj is None or isinstance(obj, (str, bool, int)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return _plain({field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)})
    if isinstance(obj, dict):
        return {str(_plain(key)): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (set, frozenset)):
        return sorted((_plain(item) for item in obj), key=str)
    if isinstance(obj, (list, tuple)):
        return [_plain(item) for item in obj]
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    return str(obj)
