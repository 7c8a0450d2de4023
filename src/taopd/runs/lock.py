"""The lock of a run folder: one process writes into it, and whoever else wants to learns who that is.

The lock is the operating system's (`filelock`), which a dead process cannot hold. Its holder is written
beside it, for the message alone.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from taopd.errors import DataError
from taopd.runs.jsonl import write_json

LOCK, HOLDER = ".lock", ".lock-holder.json"
WAIT_S = 1.0
"""Who only looks whether a lock is held takes it for a moment: the processes of one run look at once."""

logger = logging.getLogger(__name__)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, within this process as often as needed.

    Raises:
        DataError: another process holds it; names its host, its id and when it began.
    """
    lock = lock_of(folder)
    if lock.is_locked:  # by this process, further out
        yield
        return
    _acquire(lock, folder)
    try:
        if (folder / HOLDER).exists():
            logger.warning(
                "%s: taken over from a process that is gone (%s)", folder, _holder(folder)
            )
        about = {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(folder / HOLDER, about | {"since": time.strftime("%Y-%m-%d %H:%M:%S %z")})
        yield
    finally:
        # A disk that has become read-only must not hide the error that ended the run.
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def refuse_if_held(folder: Path) -> None:
    """Raise the error of `hold` if another process holds a folder's lock; takes and writes nothing."""
    if not (folder / LOCK).exists() or not os.access(folder / LOCK, os.W_OK):
        return
    lock = lock_of(folder)
    if not lock.is_locked:
        _acquire(lock, folder)
        lock.release()


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder in this process."""
    # One object a folder and process: it can be asked whether it holds the lock already.
    return FileLock(folder.absolute() / LOCK, timeout=WAIT_S, thread_local=False, is_singleton=True)


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(poll_interval=0.02)
    except Timeout:
        raise DataError(
            f"{folder} is in use by {_holder(folder)}: wait for it, stop it, or choose another output folder"
        ) from None


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
