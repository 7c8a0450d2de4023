"""Paths of the user's: `~` in their names, their modes, and the folder of what is made once and kept."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from taopd.errors import ConfigError, DataError


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced by that home folder.

    Raises:
        DataError: there is no such user, or none of this process.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"no such path: {path}: the home folder that it begins with is not known; write the whole path"
        ) from error


def with_a_name(folder: Path) -> Path:
    """The folder by a path whose last part is its name; "." and ".." have none."""
    return folder.resolve() if folder.name in ("", "..") else folder


def has_any(folder: str | Path, names: Iterable[str]) -> bool:
    """Whether one of these files is in a folder."""
    return any((Path(folder) / name).is_file() for name in names)


def with_usual_modes(path: Path) -> None:
    """Give a file, or a folder and all in it, the modes of any new file: safetensors and temporary files
    are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for each in (path, *path.rglob("*")):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder, replacing one of that name; flushed to disk on return."""
    with_usual_modes(partial)
    old = final.with_name(f".{final.name}-old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def cache_folder() -> Path:
    """`TAOPD_CACHE`, or `.cache/taopd` in the home folder.

    Raises:
        ConfigError: neither is known.
    """
    if given := os.environ.get("TAOPD_CACHE"):
        return expanded(given)
    try:
        return Path.home() / ".cache" / "taopd"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep labs and models in: set HOME, or TAOPD_CACHE to a folder"
        ) from error


def one_place(name: str) -> str:
    """A path however it is written, as one text; the id of a model on a hub as it is."""
    return os.path.realpath(name) if os.path.exists(name) else name


def refuse_twice(names: Iterable[str | Path], what: str = "") -> None:
    """Refuse a path, or another word, that stands twice in a list, however it is written.

    Args:
        what: opens the message.

    Raises:
        ConfigError: names it, and how it is written the first time.
    """
    first: dict[str, str] = {}
    for name in map(str, names):
        place = one_place(name)
        if place in first:
            also = "" if first[place] == name else f", first as {first[place]}"
            raise ConfigError(f"{what}{name} is given twice{also}: give it once")
        first[place] = name
