"""The live table of a study: an arm a row, its seeds, steps, newest accuracy, and the time that is left.

On a terminal the table is redrawn in place; elsewhere a line is printed when an arm finishes and every
`LINE_SECONDS`. An arm's share of the work is steps, kept tokens or seconds, whatever is equal.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from taopd.cli.time_left import TimeLeft
from taopd.experiments.pool import last_evaluation, logged_steps
from taopd.runs import heartbeat
from taopd.runs.shares import per_cent

if TYPE_CHECKING:
    from taopd.experiments.study.run import StudyPlan

LINE_SECONDS = 30.0
_REDRAW_SECONDS = 0.5
_AMOUNT_KEYS = {"selected_tokens": "selected_tokens", "seconds": "train_seconds"}


class StudyProgress:
    """Shows (folder, step) calls of the pool; a context manager.

    Example:
        >>> with StudyProgress(plan, Path("runs/x")) as shown:  # doctest: +SKIP
        ...     run_study(plan, output=Path("runs/x"), progress=shown)
    """

    def __init__(self, plan: "StudyPlan", output: Path) -> None:
        self._plan = plan
        self._question = plan.question
        self._folders = {
            (run.name, run.seed): plan.folder_of(run, output.absolute()) for run in plan.runs
        }
        self._steps: dict[Path, int] = {}
        self._done: set[Path] = set()
        self._told = self._drawn = 0.0

    def __enter__(self) -> "StudyProgress":
        from rich.live import Live

        from taopd.report.console import plain_console

        console = plain_console(stderr=True)
        # The lines of this table come as often by themselves.
        heartbeat.current().mute()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._left = TimeLeft()
        if self._live is not None:
            self._live.start()
        return self

    def __call__(self, folder: Path, step: int) -> None:
        """Take note of an arm's steps; redraw or print if it is time to."""
        self._steps[folder] = step
        now = time.monotonic()
        if self._live is not None:
            if now - self._drawn >= _REDRAW_SECONDS:
                self._drawn = now
                self._live.update(self._table(), refresh=True)
            return
        done = {f for f in self._folders.values() if (f / "results.json").exists()}
        if len(done) > len(self._done) or now - self._told >= LINE_SECONDS:
            self._told, self._done = now, done
            print(f"compare: {self._line(len(done))}", file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        heartbeat.current().mute(False)
        if self._live is not None:
            if kind is None:
                self._live.update(self._table(), refresh=True)
            self._live.stop()

    def _share(self, folder: Path) -> float:
        if (folder / "results.json").exists():
            return 1.0
        total = float(self._question.amount or 1.0)
        key = _AMOUNT_KEYS.get(self._question.equal)
        if key is not None:
            return min(1.0, float(last_evaluation(folder).get(key, 0.0)) / total)
        if self._question.equal == "update_norm":
            total = max(run.config["max_steps"] for run in self._plan.runs)
        return min(1.0, self._steps.get(folder, logged_steps(folder)) / total)

    def _line(self, num_done: int) -> str:
        folders = list(self._folders.values())
        shares = [self._share(folder) for folder in folders]
        seconds = self._left.seconds(shares, [(f / "results.json").exists() for f in folders])
        left = "?" if seconds is None else str(timedelta(seconds=round(seconds)))
        return (
            f"{num_done} of {len(folders)} arms finished, {per_cent(sum(shares) / len(shares), 0)} % of the "
            f"steps, {left} left"
        )

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        done = sum((folder / "results.json").exists() for folder in self._folders.values())
        shown = Table(box=box.SIMPLE_HEAD, caption=self._line(done), pad_edge=False)
        shown.add_column("arm", overflow="fold")
        for name in ("seeds done", "running: step", "newest accuracy, %"):
            shown.add_column(name, justify="right", no_wrap=True)
        for arm in self._plan.arms:
            folders = [f for (name, _), f in self._folders.items() if name == arm.name]
            finished = [f for f in folders if (f / "results.json").exists()]
            running = [f for f in folders if f not in finished and logged_steps(f)]
            newest = last_evaluation((running or finished or folders)[-1])
            accuracy = newest.get(f"accuracy_{self._question.metric}")
            shown.add_row(
                arm.name + (" (control)" if arm.added else ""),
                f"{len(finished)}/{len(folders)}",
                ", ".join(str(self._steps.get(f, 0)) for f in running) or "-",
                "-" if accuracy is None else f"{100 * accuracy:.1f}",
            )
        return shown
