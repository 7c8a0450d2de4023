"""A progress bar on stderr with a row for every kind of work, and the time that is left."""

import sys
from types import TracebackType
from typing import Any


class CountedProgress:
    """Shows (what, done, total) calls as bars; a row appears with its first call.

    A row starts at the count of its first call, so that work done by an earlier run does not count
    as speed. Interrupted work ends with the words `if_interrupted` on stderr.

    Example:
        >>> with CountedProgress() as advance:  # doctest: +SKIP
        ...     advance("arms", 10, 300)
    """

    def __init__(self, if_interrupted: str = "") -> None:
        self._if_interrupted = if_interrupted

    def __enter__(self) -> "CountedProgress":
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        from taopd.report.console import plain_console

        self._rows: dict[str, Any] = {}
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=plain_console(stderr=True),
            transient=True,
        )
        self._bars.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the row `what` to `done` of `total`."""
        if what not in self._rows:
            self._rows[what] = self._bars.add_task(what, total=total, completed=done)
        self._bars.update(self._rows[what], completed=done, total=total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt and self._if_interrupted:
            print(self._if_interrupted, file=sys.stderr)
