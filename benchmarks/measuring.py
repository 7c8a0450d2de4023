"""What the benchmarks share: memory of this process, and the lines that end their output."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def status_mib(name: str) -> float:
    """VmRSS or VmHWM of this process, MiB. Not ru_maxrss: a child inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def last_number(*arguments: str) -> float:
    """Run `python -m ARGUMENTS` and return the number on its last line."""
    argv = [sys.executable, "-m", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def versions() -> dict[str, Any]:
    """Threads, versions and processor, for the JSON line."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
    }
