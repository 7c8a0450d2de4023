"""Arms of a comparison in processes that are forked from one that has imported everything.

A start then costs a tenth of a second, and not the five in which torch and TRL are imported. Arms that start
as users' do are in `test_study.py`, which also checks that both ways end the same.
"""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

from taopd.experiments.pool import ONE_THREAD, THREADS


class ForkedArm:
    """The part of `subprocess.Popen` that the pool asks for."""

    def __init__(self, folder: Path, threads: int) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["taopd.experiments.arm"])
        self._process = server.Process(target=_run, args=(folder, threads), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def start(folder: Path, threads: int, device: str | None) -> ForkedArm:
    """In place of `taopd.experiments.pool._start`, without a device."""
    assert device is None
    return ForkedArm(folder, threads)


def _run(folder: Path, threads: int) -> None:
    """One arm, in the child."""
    gc.freeze()
    os.environ |= ONE_THREAD | {THREADS: str(threads)}
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["arm", str(folder)]
    from taopd.experiments import arm

    arm.main()
