"""Integrity of a run's checkpoints: a seal with checksums in each, and the newest complete one.

`taopd.json` is written last, into a folder that is renamed only then. It lists every file with size and
SHA-256. A checkpoint that was cut short, truncated or altered by a failing disk is detected before anything
is loaded, and the one before it is used. This detects damage, not malice. Against malice, only safetensors
and JSON are parsed: a checkpoint with a pickle is refused. DeepSpeed's own files are the exception: only
DeepSpeed can write and read them, and they are pickles.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from taopd.errors import DataError
from taopd.runs.jsonl import write_json
from taopd.runs.sha256 import file_sha256
from taopd.runs.validation import TEXT, WHOLE, read_document, shown

SEAL = "taopd.json"
PREFIX = "checkpoint-"
PARTIAL = ".checkpoint-partial"
"""Folder beside the checkpoints in which one is written."""
EARLIER = ".earlier-run"
"""File in a checkpoint that was in the folder when another run began there."""
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
Layout = Literal["replicated", "sharded", "deepspeed"]
"""Distribution of the state: full on every process (one, or DDP), a file per process (FSDP2), or DeepSpeed's
own files."""


def process_file(kind: str, process: int) -> str:
    """Name of the file that one process writes: of kind "rank", "shard" or "optimizer"."""
    return f"{kind}-{process}.safetensors"


_NEEDED = {
    "replicated": (OPTIMIZER,),
    "sharded": (process_file("shard", 0), process_file("optimizer", 0)),
    "deepspeed": (),
}
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp"})
_SEAL = {
    "step": WHOLE,
    "num_processes": WHOLE,
    "layout": TEXT,
    "files": {...: {"bytes": WHOLE, "sha256": TEXT}},
}
_NUM_THREADS = 4
"""Hashing releases the GIL; one thread hashes about a gigabyte a second."""


def seal(folder: Path, *, step: int, num_processes: int, layout: Layout = "replicated") -> None:
    """Flush every file of a finished checkpoint to disk and write its seal."""
    names = sorted(_names(folder))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, _digests(folder, names, flush=True), strict=True)
    }
    about = {"format": 1, "step": step, "num_processes": num_processes, "layout": layout}
    write_json(folder / SEAL, about | {"files": files})


def why_incomplete(folder: Path, layout: Layout = "replicated") -> str | None:
    """The reason why a run of this layout cannot resume from a checkpoint, or None."""
    if not (folder / SEAL).is_file():
        if inside := checkpoints(folder):
            return f"it is a run's folder: name a checkpoint in it, such as {inside[0].name}"
        return f"it has no {SEAL}: it was cut short, or another tool wrote it"
    try:
        about = read_document(folder / SEAL, _SEAL)
    except DataError as error:
        return f"its {SEAL} cannot be read: {error}"
    files, present = about["files"], _names(folder)
    if about["layout"] != layout:
        return (
            f"it is of a {shown(about['layout'])} run, this one is {layout} (DDP, FSDP2, DeepSpeed)"
        )
    pickles = sorted(name for name in present if Path(name).suffix.lower() in _PICKLES)
    if pickles and layout != "deepspeed":
        return f"it holds {pickles[0]}, a pickle, which taopd neither writes nor reads"
    if missing := sorted(files.keys() - present):
        return f"{missing[0]} is missing"
    if STATE not in files or any(name not in files for name in _NEEDED[layout]):
        return "it holds the model alone (save_only_model)"
    for name, sealed in files.items():
        size = (folder / name).stat().st_size
        if size != sealed["bytes"]:
            return f"{name} has {size} bytes instead of {sealed['bytes']}"
    for name, digest in zip(files, _digests(folder, files), strict=True):
        if digest != files[name]["sha256"]:
            return f"{name} is damaged: its bytes are not those that were saved"
    step = about["step"]
    if step == step_of(folder):
        return None
    return f"it is step {step} under another name: rename it {PREFIX}{step}"


def _digests(folder: Path, names: Iterable[str], *, flush: bool = False) -> list[str]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda name: file_sha256(folder / name, flush=flush), names))


def num_processes_of(folder: Path) -> int:
    """Number of processes that wrote a complete checkpoint."""
    return read_document(folder / SEAL, _SEAL)["num_processes"]


def step_of(folder: Path) -> int | None:
    """N of `checkpoint-N`, None for another name."""
    match = re.fullmatch(rf"{PREFIX}(\d+)", folder.name)
    return int(match.group(1)) if match else None


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest step first; none of an earlier run there."""
    return [path for path in _all_checkpoints(run_folder) if not (path / EARLIER).exists()]


def set_aside(run_folder: Path) -> list[Path]:
    """Mark the checkpoints of a run in whose folder another one begins, and return them.

    They stay, and are resumed from by name. Unmarked they would pass for those of the new run.
    """
    found = _all_checkpoints(run_folder)
    # The newest last: `save_total_limit` goes by the time of a folder's change.
    for path in reversed(found):
        (path / EARLIER).touch()
    return found


def _all_checkpoints(run_folder: Path) -> list[Path]:
    numbered = [(step_of(path), path) for path in run_folder.glob(f"{PREFIX}*") if path.is_dir()]
    return [path for step, path in sorted(numbered, key=lambda n: n[0] or 0, reverse=True) if step]


def newest_complete(
    run_folder: Path, layout: Layout = "replicated"
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line about each newer incomplete one."""
    passed_over: list[str] = []
    for path in checkpoints(run_folder):
        problem = why_incomplete(path, layout)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name} is passed over: {problem}")
    passed_over += [
        f"{path.name} is passed over: it is of an earlier run in this folder; name it to go on from it"
        for path in _all_checkpoints(run_folder)
        if (path / EARLIER).exists()
    ]
    return None, passed_over


def _names(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, without the seal and symbolic links."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix() for path in files} - {SEAL}
