"""Construction of a lab in a cache folder, once per variant, seed and sizes.

What: `<root>/<variant>-<hash12>/` with `teacher/`, `student/` (Hugging Face checkpoints),
`prompts.parquet` and `lab.json` (the spec, accuracies, sha256 of every file, versions, seconds). A
lab is built in a hidden sibling folder that is renamed at the end, so the name exists only for a
finished lab; an interrupted build removes what it wrote and stops its child processes. A cache hit
is checked file by file against `lab.json`; a lab that fails the check is rebuilt, with a warning
that says why.
Why not a lock: two builds of one lab write the same bytes, so the slower one just takes the
other's.
Not here: downloads; everything is made from the seed on this machine. Nor torch, whose import takes
seconds, until a lab has to be built.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from taopd.experiments.evaluation.grading import LAB_FILE
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.lab.variants import Role
from taopd.experiments.pool import ONE_THREAD
from taopd.runs.jsonl import write_json
from taopd.runs.paths import cache_folder
from taopd.runs.sha256 import file_sha256
from taopd.runs.versions import installed_version

Progress = Callable[[str, int, int], object]
"""Called as `progress(role, step, total_steps)` for role "teacher" and "student"."""

TOP_K = 4
"""Support size of the lab's scores; 16 of 48 tokens would select nothing."""
MANIFEST = LAB_FILE
PROMPTS = "prompts.parquet"
ROLES: tuple[Role, ...] = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A built lab: paths and the numbers that a recipe needs."""

    variant: str
    folder: Path
    teacher: Path
    """Hugging Face folder of the teacher (model and tokenizer)."""
    student: Path
    """Hugging Face folder of the student before any distillation."""
    prompts: Path
    """Parquet with the columns prompt, answer, split ("train" or "test")."""
    top_k: int
    max_completion_length: int
    """Tokens of a completion, its end token included."""
    answer_pattern: str
    """Regular expression; its matches in a completion's text, joined, are the graded answer."""
    manifest: dict[str, Any]
    """The content of `lab.json`; `manifest["accuracy"]` has greedy test accuracies."""


def default_root() -> Path:
    """Return `$TAOPD_CACHE/tinylab`, or `~/.cache/taopd/tinylab` where it is unset."""
    return cache_folder() / "tinylab"


def build_lab(
    variant: str = "dialect",
    *,
    root: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    parallel: bool = True,
    **sizes: Any,
) -> Lab:
    """Return the lab of this variant, seed and sizes, building it on first use.

    Args:
        root: folder of all labs; default `default_root()`.
        progress: called in this thread as `progress(role, step, total_steps)` while models train.
        parallel: train teacher and student side by side in two processes; else in this process, one
            after the other. Same files either way.
        sizes: fields of `LabSpec`, e.g. `teacher_steps=20`.

    Raises:
        ConfigError: for an unknown variant or size, or a value outside its range.

    Example:
        >>> lab = build_lab("dialect")  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained(lab.student)  # doctest: +SKIP
    """
    spec = LabSpec.from_sizes(variant, seed, sizes)
    folder = (default_root() if root is None else Path(root)) / spec.folder_name()
    if folder.exists():
        fault = _fault(folder, spec)
        if fault is None:
            return _open(folder)
        warnings.warn(f"{folder}: {fault}; building this lab again.", RuntimeWarning, stacklevel=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, since a rename is atomic only within one file system.
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(workshop / "new", spec, progress or (lambda role, step, total: None), parallel)
        _publish(workshop, folder, spec)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return _open(folder)


def _open(folder: Path) -> Lab:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Lab(
        variant=manifest["spec"]["variant"],
        folder=folder,
        teacher=folder / "teacher",
        student=folder / "student",
        prompts=folder / PROMPTS,
        top_k=manifest["top_k"],
        max_completion_length=manifest["max_completion_length"],
        answer_pattern=manifest["answer_pattern"],
        manifest=manifest,
    )


def _fault(folder: Path, spec: LabSpec) -> str | None:
    """Say what is wrong with a built lab, or return None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["spec"] != spec.to_dict():
            return f"{MANIFEST} describes another lab"
        hashes = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"{name} has changed"
    return None


def _write(folder: Path, spec: LabSpec, progress: Progress, parallel: bool) -> None:
    started = time.perf_counter()
    folder.mkdir()
    _write_prompts(folder / PROMPTS, spec)
    train = _train_in_processes if parallel else _train_here
    results = train(folder, spec, progress)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "spec": spec.to_dict(),
        "top_k": TOP_K,
        "max_completion_length": spec.rules.max_completion_length,
        "answer_pattern": spec.rules.answer_pattern,
        "accuracy": {role: results[role]["accuracy"] for role in ROLES},
        "build_seconds": round(time.perf_counter() - started, 1),
        "train_seconds": {role: round(results[role]["seconds"], 1) for role in ROLES},
        "versions": {
            name: installed_version(name)
            for name in ("torch", "transformers", "tokenizers", "pyarrow")
        },
        "sha256": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }
    write_json(folder / MANIFEST, manifest)


def _write_prompts(path: Path, spec: LabSpec) -> None:
    from taopd.experiments.lab import task
    from taopd.experiments.lab.pretrain import split_pairs

    train_pairs, test_pairs = split_pairs(spec)
    rows = [
        {
            "prompt": task.prompt_text(a, b),
            "answer": task.answer_text(spec.rules, a, b),
            "split": split,
        }
        for split, pairs in (("train", train_pairs[: spec.num_train_prompts]), ("test", test_pairs))
        for a, b in pairs.tolist()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def _publish(workshop: Path, folder: Path, spec: LabSpec) -> None:
    """Rename the finished lab to its name; a broken one in its place moves out of the way."""
    if folder.exists() and _fault(folder, spec) is None:
        return  # another process built the same lab meanwhile
    if folder.exists():
        folder.rename(workshop / "broken")
    try:
        (workshop / "new").rename(folder)
    except OSError:
        if _fault(folder, spec) is not None:
            raise


def _train_here(folder: Path, spec: LabSpec, progress: Progress) -> dict[Role, dict[str, float]]:
    from taopd.experiments.lab.pretrain import pretrain

    return {role: pretrain(spec, role, folder / role, partial(progress, role)) for role in ROLES}


def _train_in_processes(
    folder: Path, spec: LabSpec, progress: Progress
) -> dict[Role, dict[str, float]]:
    """Train both models at once, one process and one thread each."""
    lines: queue.Queue[tuple[Role, str | None]] = queue.Queue()
    children: dict[Role, subprocess.Popen[str]] = {}
    results: dict[Role, dict[str, float]] = {}

    def forward(role: Role, child: "subprocess.Popen[str]") -> None:
        for line in cast(Any, child.stdout):
            lines.put((role, line))
        lines.put((role, None))

    try:
        for role in ROLES:
            job = folder.parent / f"{role}.json"
            write_json(job, {"sizes": asdict(spec), "role": role, "folder": folder / role})
            with (folder.parent / f"{role}.stderr").open("w", encoding="utf-8") as errors:
                children[role] = subprocess.Popen(
                    [sys.executable, "-m", "taopd.experiments.lab.pretrain", str(job)],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=os.environ | ONE_THREAD,
                )
            threading.Thread(target=forward, args=(role, children[role]), daemon=True).start()
        running = set(ROLES)
        while running:
            role, line = lines.get()
            if line is None:
                running.remove(role)
                if children[role].wait() or role not in results:
                    told = (folder.parent / f"{role}.stderr").read_text(encoding="utf-8")
                    raise RuntimeError(f"The {role} did not train.\n{told[-2000:]}")
                continue
            message = json.loads(line)
            if "result" in message:
                results[role] = message["result"]
            else:
                progress(role, message["step"], message["total"])
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return results
