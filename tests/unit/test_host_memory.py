"""The memory that a process may use. Oracle: control groups as the kernel shows them, written by hand."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from taopd.errors import ConfigError
from taopd.experiments.smollm2 import real
from taopd.preflight import machine
from taopd.runs import host_memory
from taopd.runs.host_memory import free_bytes, host_bytes

GIB = 2**30
BUILT_IN = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, BUILT_IN),
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "max"}, 4000),
        ("0::/job/step\n", {"job/memory.max": "4000", "job/step/memory.max": "3000"}, 3000),
        ("3:cpu:/\n4:memory:/a/b\n0::/\n", {"memory/a/b/memory.limit_in_bytes": "2000"}, 2000),
        # Within a container of version 1: the path is that of the outside.
        ("4:memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, BUILT_IN),
        (None, {}, BUILT_IN),
    ],
)
def test_a_limit_of_the_group_counts(tmp_path, cgroup, files, expected):
    if cgroup is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert host_bytes(tmp_path) == expected


def test_the_check_goes_by_it(monkeypatch):
    monkeypatch.setattr(machine, "host_bytes", lambda: 7)
    assert machine._machine_bytes(on_gpu=False) == 7


@pytest.mark.parametrize(("available", "limit", "left"), [(50, 200, 50), (50, 40, 39), (50, 1, 0)])
def test_what_is_free_is_no_more_than_the_limit_leaves(monkeypatch, available, limit, left):
    """A process of 1 GiB on a machine that has 50 GiB free, whatever its container may take."""
    system = {
        "virtual_memory": lambda: SimpleNamespace(available=available * GIB),
        "Process": lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)),
    }
    monkeypatch.setattr(host_memory, "psutil", SimpleNamespace(**system))
    monkeypatch.setattr(host_memory, "host_bytes", lambda: limit * GIB)
    assert free_bytes() == left * GIB


def test_nothing_else_asks_the_system_what_is_free():
    """It would show the whole machine to a container."""
    root = Path(host_memory.__file__).parents[3]
    files = [
        path for room in ("src", "benchmarks", "scripts") for path in (root / room).rglob("*.py")
    ]
    asking = [path.name for path in files if "virtual_memory" in path.read_text(encoding="utf-8")]
    assert asking == ["host_memory.py"]


def test_the_real_demo_goes_by_it(monkeypatch):
    """An arm takes up to 6.4 GiB."""
    for free, arms in ((13, 2), (12.7, 1), (9, 1)):
        monkeypatch.setattr(real, "free_bytes", lambda free=free: free * GIB)
        assert real.arms_that_fit() == arms
    monkeypatch.setattr(real, "free_bytes", lambda: 4 * GIB)
    with pytest.raises(ConfigError, match=r"4\.0 GiB of memory are free"):
        real.arms_that_fit()
