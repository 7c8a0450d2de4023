"""What an input must not cause: a file written outside its folder, a process, a connection, an unpickling.

An audit hook sees every `open`, rename, removal, socket and process of this interpreter (PEP 578). It cannot
be taken off again, so it looks at the fence that is up, if any.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ONE_PATH = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}
_TWO_PATHS = {"os.rename", "os.link", "os.symlink", "shutil.move"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}
_NEVER |= {"socket.connect", "socket.bind", "socket.getaddrinfo"}

_inside: Path | None = None
_found: list[str] = []


class Escaped(BaseException):
    """Something outside the fence was touched; no `except Exception` swallows it."""


def _hook(event: str, args: tuple) -> None:
    if _inside is None:
        return
    if event in _NEVER:
        _found.append(f"{event} {str(args)[:200]}")
    elif event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        if (writes or (flags or 0) & _WRITES) and isinstance(path, (str, bytes, os.PathLike)):
            _check(event, path)
    elif event in _ONE_PATH:
        # Relative to an open folder: inside shutil.rmtree, whose own event names the folder.
        if not (len(args) > 1 and event in ("os.remove", "os.rmdir") and args[-1] != -1):
            _check(event, args[0])
    elif event in _TWO_PATHS:
        _check(event, args[0])
        _check(event, args[1])


def _check(event: str, path: object) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    full = os.path.realpath(os.fsdecode(path))
    # A probe for room in a folder that a command was named, made and removed at once.
    if event in ("os.mkdir", "os.rmdir") and os.path.basename(full).startswith(".taopd-"):
        return
    if full != str(_inside) and not full.startswith(f"{_inside}{os.sep}") and full != os.devnull:
        _found.append(f"{event} {full}")


_hooked = False


@contextmanager
def fence(folder: Path) -> Iterator[None]:
    """Inside the block nothing may be written outside `folder`, started, connected to or unpickled.

    Raises:
        Escaped: at the end of the block, with what happened.
    """
    global _hooked, _inside
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _found.clear()
    _inside = Path(os.path.realpath(folder))
    try:
        yield
    finally:
        _inside = None
        if _found:
            raise Escaped("; ".join(_found[:5]))
