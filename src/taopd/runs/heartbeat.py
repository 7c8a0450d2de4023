"""A line on stderr after every 30 seconds without one: on a terminal, in a queue's log file and in CI alike.

`taopd.cli.main` starts one for every command. The first line comes within a second, while the libraries load.
Whoever knows how far the work is says so with `report`; without that the line says for how long the command
has run. Bars on a terminal and `--quiet` mute it.
"""

import sys
import threading
import time
from collections.abc import Callable

SECONDS = 30.0
FIRST_SECONDS = 0.7
"""A command that has ended by then, or loads nothing heavy, has no first line."""
HEAVY = ("torch", "pandas")
"""Libraries that take a command seconds to load, one of them at least."""


class Heartbeat:
    """Prints from a thread of its own, so that it beats while the command waits for a long step.

    Args:
        command: name of the command, which begins every line.
        quiet: no first line.
    """

    def __init__(self, command: str, *, quiet: bool = False) -> None:
        self._command = command
        # In a process that has them loaded nothing keeps the first word back.
        self._loads = not quiet and not any(name in sys.modules for name in HEAVY)
        self._began = self._last = time.monotonic()
        self._status: Callable[[], str] | None = None
        self._muted = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        global _current
        _current = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def report(self, status: Callable[[], str] | None) -> None:
        """How far the work is, asked for when a line is due; None: nobody knows."""
        self._status = status
        self.touch()

    def touch(self) -> None:
        """A line was printed by somebody: the next one is due later."""
        self._last = time.monotonic()

    def mute(self, muted: bool = True) -> None:
        """Print nothing, or again."""
        self._muted = muted
        self.touch()

    def _run(self) -> None:
        begun = self._loads and not self._ended.wait(FIRST_SECONDS) and not self._muted
        if begun and any(name in sys.modules for name in HEAVY):
            print(f"taopd {self._command}: loading libraries", file=sys.stderr, flush=True)
        while not self._ended.wait(min(1.0, SECONDS / 4)):
            now = time.monotonic()
            if self._muted or now - self._last < SECONDS:
                continue
            self._last = now
            words = self._status() if self._status else "running"
            line = f"taopd {self._command}: {words}, {clock(now - self._began)} so far"
            print(line, file=sys.stderr, flush=True)


_current = Heartbeat("")
"""That of the running command; one that never beats before."""


def current() -> Heartbeat:
    """The heartbeat of the running command."""
    return _current


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.

    Example:
        >>> clock(3661)
        '1:01:01'
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def left(seconds: float, done: int, total: int) -> str:
    """The time left in words, where `done` of `total` took so many seconds.

    Example:
        >>> left(60.0, 1, 3), left(60.0, 0, 3)
        ('left 0:02:00', 'left ?')
    """
    return f"left {clock(seconds / done * (total - done))}" if done > 0 else "left ?"
