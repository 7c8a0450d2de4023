"""Folders of files that are written atomically and verified by the hashes in a manifest.

The manifest holds size and sha256 of every file and a sha256 of itself. Times, paths and maps in random
order are not written, so that the same input gives the same bytes and a folder may be moved.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from taopd.errors import DataError
from taopd.runs.disk import cannot_write
from taopd.runs.folder import refuse_file
from taopd.runs.jsonl import write_json
from taopd.runs.paths import expanded, with_usual_modes
from taopd.runs.sha256 import file_sha256, json_sha256
from taopd.runs.validation import ANY, TEXT, WHOLE, fit, read_document, shown

MANIFEST = "manifest.json"
SOURCES = "sources.json"
"""Paths of the models relative to the bank; not part of its manifest, so that the bank's bytes do not depend
on its path."""
_SHAPE = {"format": ANY, "sha256": TEXT, "files": {...: {"bytes": WHOLE, "sha256": TEXT}}}


def write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a Parquet file; equal columns give equal bytes, because every writer setting is fixed."""
    # A plain schema: pandas' own metadata would put its version into the file.
    pq.write_table(
        pa.table(dict(columns)),
        path,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        row_group_size=2**17,
        use_dictionary=False,
        write_statistics=True,
        store_schema=False,
    )


def write_manifest(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Hash every file of a finished folder and write its manifest."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    document = {"format": kind, **content, "files": files}
    write_json(folder / MANIFEST, document | {"sha256": _own_sha256(document)})


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder, after every file was checked against it.

    Args:
        kind: the format it must have, such as "taopd-bank-1".

    Raises:
        DataError: no such folder, a file in its place, another kind of folder, or a file that is missing,
            truncated or edited; says which and how.
    """
    folder = Path(folder)
    what = kind.rpartition("-")[0].removeprefix("taopd-")
    if folder.is_file():
        raise DataError(f"{folder} is a file; a {what} is a folder with {MANIFEST}")
    if not folder.is_dir():
        raise DataError(f"no such {what} folder: {folder} (looked in {Path.cwd()})")
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is no {what}: it has no readable {MANIFEST}")
    try:
        manifest = read_document(path)
    except DataError as error:
        raise DataError(f"{error}; the {what} was truncated or edited") from error
    fit(manifest, {...: ANY}, str(path))
    if manifest.get("format") != kind:
        raise DataError(
            f"{folder} is no {what}: its manifest says format {manifest.get('format')!r}, expected "
            f"{kind!r}"
        )
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("sha256") != _own_sha256(content):
        raise DataError(f"{path} was edited: its own sha256 does not fit; make it anew")
    fit(manifest, _SHAPE, str(path))
    for name, expected in manifest["files"].items():
        if Path(name).name != name:
            raise DataError(f"{path} names {shown(name)}, which is no file of this folder")
        _check_file(folder / name, expected, what)
    return manifest


def check_destination(folder: str | Path, kind: str, *, overwrite: bool) -> Path:
    """The absolute path, if a folder of that kind may be written there; writes nothing.

    Raises:
        DataError: it is a file, or holds anything else, or holds such a folder and not `overwrite`.
    """
    path = expanded(folder).absolute()
    refuse_file(path, folder)
    if not path.exists() or not any(path.iterdir()):
        return path
    what = kind.rpartition("-")[0].removeprefix("taopd-")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        names = {*manifest["files"], MANIFEST, SOURCES}
        ours = manifest["format"] == kind
    except (OSError, ValueError, KeyError, TypeError):
        names, ours = set(), False
    if not ours:
        raise DataError(f"{folder} holds files that are no {what}; choose another output folder")
    if not overwrite:
        raise DataError(f"{folder} already holds a {what}; choose another folder or --overwrite")
    foreign = sorted({file.name for file in path.iterdir()} - names)
    if foreign:
        raise DataError(
            f"{folder} holds {foreign[0]} beside the {what}, and overwriting would remove it; move it away"
        )
    return path


@contextmanager
def written_whole(path: Path, kind: str, *, overwrite: bool) -> Iterator[Path]:
    """Context with a temporary folder whose files become those of `path` on success; removed on an error.

    Args:
        kind, overwrite: as of `check_destination`, which looks once more before anything is replaced.

    Raises:
        DataError: the path cannot be written, before or after, or holds something else by then.
    """
    called, path = path, path.resolve()  # a link may lead to another disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        )
    except OSError as error:
        raise DataError(f"cannot write to {path}: {error.strerror or error}") from error
    try:
        yield partial
        with_usual_modes(partial)
        check_destination(called, kind, overwrite=overwrite)
        _move_into(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (what := cannot_write(error, weights=False)) is not None:
            raise DataError(
                f"cannot write {what} of {path}: nothing is left half-written. Make room or mend the "
                "folder, and give the command again"
            ) from error
        raise


def _move_into(partial: Path, path: Path) -> None:
    """Make the files of a folder those of another one, which stays: it may be the one that a shell is in.

    The manifest goes first and comes last: without it the rest is no bank.
    """
    if not path.exists():
        partial.rename(path)
        return
    for old in sorted(path.iterdir(), key=lambda file: file.name != MANIFEST):
        old.unlink()
    for new in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
        new.rename(path / new.name)
    partial.rmdir()


def _check_file(path: Path, expected: Mapping[str, Any], what: str) -> None:
    if not path.is_file():
        raise DataError(f"the {what} is incomplete: {path} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        change = "truncated" if size < expected["bytes"] else "edited"
        raise DataError(
            f"{path} was {change}: it has {size} bytes and the manifest says {expected['bytes']}"
        )
    digest = file_sha256(path)
    if digest != expected["sha256"]:
        raise DataError(
            f"{path} was edited: its sha256 is {digest[:12]}... and the manifest says "
            f"{expected['sha256'][:12]}..."
        )


def _own_sha256(document: Mapping[str, Any]) -> str:
    # Through JSON and back: what is hashed at writing must equal what is read.
    return json_sha256(json.loads(json.dumps(document)))
