"""Paths of the user's: `~` in their names, and the folder of what is made once and kept."""

import os
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


def cache_folder() -> Path:
    """`TAOPD_CACHE`, or `.cache/taopd` in the home folder.

    Raises:
        ConfigError: neither is known.
    """
    if given := os.environ.get("TAOPD_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "taopd"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep labs and models in: set HOME, or TAOPD_CACHE to a folder"
        ) from error


def one_place(name: str) -> str:
    """A path however it is written, as one text; the id of a model on a hub as it is."""
    return os.path.realpath(name) if os.path.exists(name) else name
