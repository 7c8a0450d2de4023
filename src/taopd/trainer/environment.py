"""Where a run happened: versions, seeds, devices, the commit of the folder in which it was started. What
`env.json` of a run folder holds."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from taopd.runs.redaction import redact_command
from taopd.runs.versions import installed_version

_PACKAGES = (
    "taopd",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "numpy",
)
_GIT_TIMEOUT_SECONDS = 5


def environment(**seeds: int | None) -> dict[str, Any]:
    """Return what `env.json` holds: versions, commit, seeds, device, command line, UTC time.

    Environment variables are never recorded; a secret (`taopd.runs.redaction`) is replaced by "***".

    Example:
        >>> environment(seed=0)["seeds"]
        {'seed': 0}
    """
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    else:
        devices = [
            f"cpu ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"
        ]
    return {
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        # A commit alone does not say what ran.
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "seeds": dict(seeds),
        "devices": devices,
        "platform": platform.platform(),
        "argv": redact_command(sys.argv),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
