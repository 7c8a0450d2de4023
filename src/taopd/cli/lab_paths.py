"""The bundled tiny lab by name: `lab: dialect` in a config, `lab:dialect/student` as an argument.

A lab is built on first use, in a folder of the cache whose name nobody can guess.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.errors import DataError

if TYPE_CHECKING:
    from taopd.experiments.lab import Lab

_NAMED = re.compile(r"(--[\w-]+=)?lab:([\w-]+)/(.+)")


def lab_settings(variant: str) -> dict[str, Any]:
    """The settings of `taopd train` that a lab stands for.

    Several variants joined by "+": the student of the first, a teacher from each under its variant's name,
    and the prompts of all, with that name in the column `teacher`.

    Raises:
        ConfigError: there is no such variant.
    """
    if "+" in variant:
        return _several([_build(name) for name in variant.split("+")])
    lab = _build(variant)
    return {
        "model_name_or_path": str(lab.student),
        "teacher_model_name_or_path": str(lab.teacher),
        "dataset_name": str(lab.prompts),
    }


def check_lab(variant: str) -> None:
    """Refuse the setting `lab` where it names a variant that does not exist; builds nothing.

    Raises:
        ConfigError: with the nearest known name.
    """
    from taopd.experiments.lab.spec import check_variant

    for name in variant.split("+"):
        check_variant(name)


def with_lab_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, each `lab:VARIANT/FILE` replaced by its path, also behind `--flag=`.

    Raises:
        ConfigError: there is no such variant. DataError: the lab has no such file.
    """
    return [_with_path(found) if (found := _NAMED.fullmatch(each)) else each for each in arguments]


def _several(labs: "Sequence[Lab]") -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    labs = list({lab.variant: lab for lab in labs}.values())
    prompts = labs[0].folder.parent / f"{'+'.join(lab.folder.name for lab in labs)}.parquet"
    # Row by row of each in turn: a generation batch then has all of them.
    tables = [pq.read_table(lab.prompts) for lab in labs]
    rows = pa.concat_tables(
        table.append_column("teacher", pa.repeat(lab.variant, len(table)))
        for lab, table in zip(labs, tables, strict=True)
    )
    places = [place for table in tables for place in range(len(table))]
    order = sorted(range(len(places)), key=places.__getitem__)  # stable
    partial = prompts.with_name(f".{prompts.name}.{os.getpid()}")
    pq.write_table(rows.take(order), partial)
    partial.replace(prompts)
    return {
        "model_name_or_path": str(labs[0].student),
        "teachers": {lab.variant: {"model": str(lab.teacher)} for lab in labs},
        "dataset_name": str(prompts),
    }


def _with_path(found: re.Match[str]) -> str:
    flag, variant, name = found.groups(default="")
    return f"{flag}{_path(variant, name)}"


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
