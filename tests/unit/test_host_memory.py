"""The memory that a process may use. Oracle: control groups as the kernel shows them, written by hand."""

import os

import pytest

from taopd.preflight import items
from taopd.preflight.host_memory import host_bytes

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
    monkeypatch.setattr(items, "host_bytes", lambda: 7)
    assert items._machine_bytes(on_gpu=False) == 7
