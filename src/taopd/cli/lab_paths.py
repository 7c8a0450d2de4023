"""The bundled tiny lab by name: `lab: dialect` in a config, `lab:dialect/student` as an argument.

A lab is built on first use, in a folder of the cache whose name nobody can guess.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taopd.errors import DataError

if TYPE_CHECKING:
    from taopd.experiments.lab import Lab

_NAMED = re.compile(r"lab:([\w-]+)/(.+)")


def lab_settings(variant: str) -> dict[str, str]:
    """The settings of `taopd train` that a lab stands for.

    Raises:
        ConfigError: there is no such variant.
    """
    lab = _build(variant)
    return {
        "model_name_or_path": str(lab.student),
        "teacher_model_name_or_path": str(lab.teacher),
        "dataset_name": str(lab.prompts),
    }


def with_lab_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, each `lab:VARIANT/FILE` replaced by its path.

    Raises:
        ConfigError: there is no such variant. DataError: the lab has no such file.
    """
    return [
        str(_path(*found.groups())) if (found := _NAMED.fullmatch(each)) else each
        for each in arguments
    ]


def _path(variant: str, name: str) -> Path:
    folder = _build(variant).folder
    if not (folder / name).exists():
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise DataError(f"lab:{variant}/{name}: the lab has {there}")
    return folder / name


def _build(variant: str) -> "Lab":
    from taopd.cli.progress import CountedProgress
    from taopd.experiments import lab

    with CountedProgress() as advance:
        return lab.build_lab(variant, progress=advance)
