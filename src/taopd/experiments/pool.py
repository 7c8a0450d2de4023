"""A pool of subprocesses that run arms, with progress.

Knows folders and processes only: it imports no torch, so that waiting costs nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taopd.errors import DataError

POLL_SECONDS = 0.25
ONE_THREAD = {
    # Two OpenMP threads that spin against another process make a step 40 times slower.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a process beside which others compute."""
THREADS = "TAOPD_THREADS"
"""Environment variable of an arm: its share of the CPU's cores, which a large model uses."""
STOP_WITH_PARENT = "--stop-with-parent"
"""Flag of `python -m taopd.experiments.arm`: a killed comparison leaves no arms running."""
CURVE_FILE = "accuracy.jsonl"
"""What an arm appends after every evaluation: step, accuracies, kept tokens, seconds."""
_TAIL_BYTES = 16_384
"""Read first of the end of a file: enough for the last few lines of `metrics.jsonl`."""


def run_pool(
    folders: list[Path],
    *,
    num_workers: int | None = None,
    devices: Sequence[str] = (),
    progress: Callable[[Path, int], None] = lambda folder, step: None,
) -> None:
    """Run every arm folder that has no `results.json` yet.

    Args:
        num_workers: arms at a time; default one per CPU core.
        devices: GPUs as CUDA_VISIBLE_DEVICES names them; each arm sees the one that fewest others use.
        progress: called with a folder and the steps its arm has logged, finished arms included.

    Raises:
        DataError: if an arm fails; its `log.txt` holds what it printed. Arms that run are stopped,
            finished ones keep their results.
    """
    num_workers = num_workers or os.cpu_count() or 1
    waiting = [folder for folder in folders if not (folder / "results.json").exists()]
    for folder in folders:
        if folder not in waiting:
            progress(folder, logged_steps(folder))
    running: dict[Path, subprocess.Popen] = {}
    device_of: dict[Path, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                folder = waiting.pop(0)
                if devices:
                    used = [device_of[other] for other in running]
                    device_of[folder] = min(devices, key=used.count)
                threads = max(1, (os.cpu_count() or 1) // num_workers)
                running[folder] = _start(folder, threads, device_of.get(folder))
            for folder, process in list(running.items()):
                progress(folder, logged_steps(folder))
                if process.poll() is None:
                    continue
                del running[folder]
                if process.returncode != 0:
                    raise DataError(_failure(folder, process.returncode))
            time.sleep(POLL_SECONDS)
    finally:
        # An unfinished arm goes on from its last checkpoint: a few minutes are not worth a wait.
        for process in running.values():
            process.kill()
        for process in running.values():
            process.wait()


def logged_steps(folder: Path) -> int:
    """Optimizer steps in the arm's `metrics.jsonl`; 0 before the first."""
    return int((_last_line(folder / "metrics.jsonl") or {"step": 0})["step"])


def last_evaluation(folder: Path) -> dict[str, Any]:
    """The arm's newest line of `accuracy.jsonl`; empty before the first evaluation."""
    return _last_line(folder / CURVE_FILE) or {}


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last complete document with a step; an unfinished line is skipped."""
    size = _TAIL_BYTES
    while True:
        try:
            with open(path, "rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - size)
                file.seek(start)
                lines = file.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            try:
                document = json.loads(line)
                if isinstance(document, dict) and "step" in document:
                    return document
            except ValueError:  # also of digits: the end of a cut line may be one number
                continue
        if not start:
            return None
        size *= 8  # a line of `accuracy.jsonl` has two digits for every problem


def _start(folder: Path, threads: int, device: str | None) -> subprocess.Popen:
    environment = os.environ | ONE_THREAD | {THREADS: str(threads)}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "taopd.experiments.arm", str(folder), STOP_WITH_PARENT],
            stdin=subprocess.PIPE,  # Never written to: it ends when this process does.
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _failure(folder: Path, code: int) -> str:
    log = folder / "log.txt"
    if code == -signal.SIGKILL:
        # Its log ends with whatever it said before.
        how = "was killed, as the system does where memory runs out (fewer --workers need less)"
    else:
        # A process that was stopped may have written a part of a character.
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        if not text.endswith("\n"):
            last += " (its log ends there: is the disk full?)"
        how = f"stopped with status {code}: {last}"
    return (
        f"the arm in {folder} {how} (its log: {log}); finished arms are kept, go on with --resume"
    )
