"""The memory of the machine that a process may use: what is built in, or the limit of its container or job.

Docker, Kubernetes and Slurm set the limit on a control group (cgroup, version 1 or 2); the kernel ends
whoever goes beyond it, while the system still shows the whole machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_FILES = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}
"""By the controllers of a line of /proc/self/cgroup: folder below the mount, and file of the limit."""


def host_bytes(root: Path = Path("/")) -> int:
    """Bytes, whoever uses them now.

    Args:
        root: that /proc and /sys are below.
    """
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([built_in, *_limits(root)])


def free_bytes() -> int:
    """Bytes that this process may still take: those free on the machine, if its limit leaves as many."""
    left = host_bytes() - psutil.Process().memory_info().rss
    return max(0, min(psutil.virtual_memory().available, left))


def _limits(root: Path) -> Iterator[int]:
    """Of the group of this process and of all groups around it, as far as they are visible."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").split("\n")
    except OSError:  # no Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        known = [_FILES[name] for name in controllers.split(",") if name in _FILES]
        for below, name in known if group else ():
            mount = root / "sys/fs/cgroup" / below
            # Within a container the group's own path may not be there: its limit is at the mount.
            inner = mount / group.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(mount):
                    yield from _number(folder / name)


def _number(file: Path) -> Iterator[int]:
    try:
        yield int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": none
        return
