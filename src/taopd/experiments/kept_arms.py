"""What a comparison does with arms that lie in its folder already: a finished one is kept if it is the same.

The same: the settings of `arm.json`, and the files that it reads. A model that was made anew under its old
path is another model, so what lies there is told by its content (`inputs.json`, beside `arm.json`).
Why not a hash of all of a file: a 70 B teacher would take minutes. Training moves every weight, so that some
blocks of a file tell two models apart as well as all of it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.arm_settings import Arm, write_arm
from taopd.experiments.study.finished import read_outcome
from taopd.runs.checkpoints import newest_complete
from taopd.runs.jsonl import write_json
from taopd.runs.paths import expanded
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document

INPUTS = "inputs.json"
READ = ("student", "teacher", "prompts", "test_prompts")
"""Fields of an arm that name what it reads."""
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jsonl", ".csv", ".parquet")
_BLOCK, _BLOCKS = 65_536, 32
"""Of a file, in bytes: the size of a block that is read, and how many, evenly over it."""


def prepare(arms: Iterable[tuple[Arm, Path]]) -> None:
    """Make the folders of arms ready to run: finished ones stay, and those of the same arm with a checkpoint;
    others are cleared.

    Raises:
        DataError: an arm has finished with other settings or inputs than these, or its results are damaged;
            nothing is changed then.
    """
    known = cache(lambda name: None if name is None else content(expanded(name)))
    unfinished = []
    for arm, place in arms:
        inputs = {name: known(getattr(arm, name)) for name in READ}
        if (place / "results.json").exists():
            _check(arm, place, inputs)
        else:
            unfinished.append((arm, place, inputs))
    for arm, place, inputs in unfinished:
        if _goes_on(arm, place, inputs):
            continue
        if (place / "arm.json").exists():
            shutil.rmtree(place)
        write_arm(arm, place)
        write_json(place / INPUTS, inputs)


def _goes_on(arm: Arm, place: Path, inputs: Mapping[str, str | None]) -> bool:
    """Whether an unfinished arm is this one, and has a checkpoint to go on from."""
    try:
        before, noted = (read_document(place / name, OBJECT) for name in ("arm.json", INPUTS))
    except DataError:
        return False
    # Last: it reads all of the checkpoint.
    return (before, noted) == (_as_written(arm), inputs) and newest_complete(place)[0] is not None


def _as_written(arm: Arm) -> dict[str, Any]:
    """The settings as `arm.json` gives them back."""
    return json.loads(json.dumps(asdict(arm)))


def _check(arm: Arm, place: Path, inputs: Mapping[str, str | None]) -> None:
    # A table is made of it, after the last arm.
    read_outcome(place / "results.json")
    before, now = read_document(place / "arm.json", OBJECT), _as_written(arm)
    changed = list(_differing(before, now))
    # Arms of earlier versions have not noted what they read.
    noted = read_document(place / INPUTS, OBJECT) if (place / INPUTS).is_file() else {}
    other = [name for name in READ if None not in (noted.get(name), inputs[name])]
    other = [name for name in other if noted[name] != inputs[name] and name not in changed]
    if changed:
        what = f"with other settings ({', '.join(changed)})"
    elif other:
        paths = ", ".join(f"{name} {getattr(arm, name)}" for name in other)
        what = f"with other files than lie there now ({paths})"
    else:
        return
    raise DataError(
        f"arm {arm.folder_name} finished {what}; use another output folder, or start anew with --overwrite"
    )


def digest_of(arms: Iterable[Arm]) -> str:
    """The same for arms of the same settings, wherever on the disk the lab lies that they are trained on."""
    found = hashlib.sha256()
    for arm in arms:
        settings = asdict(arm)
        for name in READ:
            path = settings.pop(name)
            # A lab's folder bears a hash of what it was made of.
            settings[name] = None if path is None else Path(path).parts[-2:]
        found.update(json.dumps(settings, sort_keys=True).encode())
    return found.hexdigest()[:32]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings that are not the same, those of the trainer one by one."""
    for name in sorted(now):
        old, new = before.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name}.{k}" for k in sorted({*old, *new}) if old.get(k) != new.get(k))
        else:
            yield name


def content(path: Path) -> str | None:
    """A digest of a file, or of the model or data files right in a folder; None where there is none.

    Of a file larger than 2 MiB its size and some blocks.
    """
    try:
        files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        files = [file for file in files if file.is_file() and file.suffix in _SUFFIXES]
        found = hashlib.sha256()
        for file in files:
            found.update(f"{'' if file == path else file.name}\0{file.stat().st_size}\0".encode())
            for block in _blocks(file):
                found.update(block)
    except OSError:  # a hub id that no file system takes, or what cannot be read: the arm says so
        return None
    return found.hexdigest()[:32] if files else None


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if size <= _BLOCK * _BLOCKS:
            yield stream.read()
            return
        for index in range(_BLOCKS):
            stream.seek(index * (size - _BLOCK) // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
