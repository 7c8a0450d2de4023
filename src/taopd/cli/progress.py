"""How far counted work is: bars on a terminal, lines elsewhere, both with the time that is left."""

import sys
import time
from types import TracebackType
from typing import Any

from taopd.runs import heartbeat


class CountedProgress:
    """Shows (what, done, total) calls as a row for every kind of work; a row appears with its first call.

    A row starts at the count of its first call, so that work done by an earlier run does not count
    as speed; a count that falls is that of the next piece of such work, and starts anew. Interrupted
    work ends with the words `if_interrupted` on stderr.

    Example:
        >>> with CountedProgress() as advance:  # doctest: +SKIP
        ...     advance("arms", 10, 300)
    """

    def __init__(self, if_interrupted: str = "") -> None:
        self._if_interrupted = if_interrupted
        self._rows: dict[str, Any] = {}
        self._counts: dict[str, tuple[float, int, int, int]] = {}
        """Per row when it began, where, where it is and where it ends."""

    def __enter__(self) -> "CountedProgress":
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        from taopd.report.console import plain_console

        console = plain_console(stderr=True)
        if not console.is_terminal:
            self._bars = None
            heartbeat.current().report(self._words)
            return self
        heartbeat.current().mute()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Of rich, 30 seconds: a batch that takes longer would never get an estimate.
            speed_estimate_period=7 * 24 * 3600.0,
        )
        self._bars.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the row `what` to `done` of `total`."""
        now = time.monotonic(), done, done, total
        began, first, before = self._counts.get(what, now)[:3]
        anew = done < before
        if anew:
            began, first, before = now[:3]
        self._counts[what] = began, first, done, total
        if self._bars is None:
            # Once: whoever counts may ask again while the last unit is put away.
            if done == total > before:
                print(f"{what} {done}/{total}", file=sys.stderr, flush=True)
                heartbeat.current().touch()
            return
        if what not in self._rows:
            self._rows[what] = self._bars.add_task(what, total=total, completed=done)
        elif anew:
            self._bars.reset(self._rows[what], total=total, completed=done)
        self._bars.update(self._rows[what], completed=done, total=total)

    def _words(self) -> str:
        """The rows that are not done, in one line."""
        now = time.monotonic()
        rows = [
            f"{what} {done}/{total}, {heartbeat.left(now - began, done - first, total - first)}"
            for what, (began, first, done, total) in self._counts.items()
            if done < total
        ]
        return "; ".join(rows) or "running"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        heartbeat.current().mute(False)
        heartbeat.current().report(None)
        if kind is KeyboardInterrupt and self._if_interrupted:
            print(self._if_interrupted, file=sys.stderr)
