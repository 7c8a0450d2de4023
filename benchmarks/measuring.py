"""What the benchmarks share: times, memory of this process, and the lines that end their output."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Freed blocks of 64 KiB or more go back to the system, so that a peak is not the allocator's."""


def status_mib(name: str) -> float:
    """VmRSS or VmHWM of this process, MiB. Not ru_maxrss: a child inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def forget_peak() -> None:
    """Let VmHWM begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def last_line(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run `python -m ARGUMENTS` with these variables and return the last line of its output."""
    argv = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        argv, capture_output=True, text=True, env=os.environ | (environment or {})
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def first_lines(arguments: Sequence[str], marks: Mapping[str, str]) -> dict[str, float]:
    """Run `python -m ARGUMENTS`; seconds until a line holds each mark, by the clock and of the process.

    Marks are looked for in their order; "" is any line.
    """
    began, found, output = time.monotonic(), {}, []
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    waiting = list(marks.items())
    for line in process.stdout:
        output.append(line)
        if waiting and waiting[0][1] in line:
            name = waiting.pop(0)[0]
            found[f"{name}_s"] = time.monotonic() - began
            # Fields 14 and 15: user and system time in ticks. The name before them may hold blanks.
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            found[f"{name}_cpu_s"] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    if process.wait() or waiting:
        sys.exit("".join(output))
    return found


def call_seconds(function: Callable[[], object], *, warmup: int, repeats: int) -> list[float]:
    """Sorted seconds of `repeats` calls after `warmup` others."""
    times = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times[warmup:])


def update_seconds(
    losses: Mapping[str, Callable[[], Tensor]],
    leaves: Iterable[Tensor],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every loss and its backward by a clock, alternating, after one run of each."""
    leaves = list(leaves)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(repeats + 1):
        for name, loss in losses.items():
            for leaf in leaves:
                leaf.grad = None
            started = clock()
            loss().backward()
            if repeat:
                times[name].append(clock() - started)
    return times


def update_peak_mib(loss: Callable[[], Tensor], leaves: Iterable[Tensor]) -> float:
    """Peak of one loss and its backward above what is there with gradient buffers, MiB."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf).add_(0.0)
    before = status_mib("VmRSS")
    loss().backward()
    return status_mib("VmHWM") - before


def versions() -> dict[str, Any]:
    """Threads, versions and processor, for the JSON line."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
    }
