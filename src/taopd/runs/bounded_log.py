"""A JSON-lines log of a run that stays below a size, however long the run.

Why thinned: a run of a week would fill the disk with what nobody reads. At the limit every second step is
taken out, and from then on every second one is written, and so on: the file stays between half the limit
and the limit, and shows the whole run evenly. It says so in the log.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taopd.runs.jsonl import append_jsonl, read_jsonl, rewind_jsonl, thin_jsonl

MAX_BYTES = 256 * 2**20
"""200 rollouts of 512 tokens are 40 MB; of metrics it is about 100,000 steps."""

logger = logging.getLogger("taopd.runs.bounded_log")


class BoundedLog:
    """Lines with a "step", appended in its order.

    Args:
        stays: lines that are kept whatever their step (evaluations).
        distance: steps between lines that come at 1, 1 + distance and so on. With 2 all of them are odd: what
            is taken out is counted in lines then.
    """

    def __init__(
        self,
        path: Path,
        stays: Callable[[dict[str, Any]], bool] | None = None,
        *,
        distance: int = 1,
    ) -> None:
        self._path, self._distance = path, distance
        self._stays = stays or (lambda line: False)
        self.every = 1
        """Steps whose number, counted from 1 with that distance, is a multiple of it are kept."""

    def keeps(self, step: int) -> bool:
        """Whether lines of a step are kept, as thin as the log is now."""
        return self._number(step) % self.every == 0

    def _number(self, step: int) -> int:
        return (step - 1) // self._distance + 1

    def rewind(self, step: int) -> None:
        """Keep the lines of earlier steps, and the thinning that an interrupted run had come to."""
        rewind_jsonl(self._path, step)
        self.every = 1
        if self._path.exists() and self._path.stat().st_size > MAX_BYTES // 4:
            lines = read_jsonl(self._path)
            lines = [line for line in lines if line["step"] and not self._stays(line)]
            numbers = [self._number(line["step"]) for line in lines]
            while numbers and all(number % (2 * self.every) == 0 for number in numbers):
                self.every *= 2

    def append(self, *lines: dict[str, Any]) -> None:
        """Write lines of one step, if it is one of those that are kept."""
        kept = [line for line in lines if self._is_kept(line)]
        if not kept:
            return
        append_jsonl(self._path, *kept)
        number = self._number(kept[0]["step"])
        while self._path.stat().st_size > MAX_BYTES and self.every <= number:
            self.every *= 2
            thin_jsonl(self._path, self._is_kept)
            logger.warning(
                "%s reached %d MiB: only one step of %d is kept in it",
                self._path,
                MAX_BYTES >> 20,
                self.every * self._distance,
            )

    def _is_kept(self, line: dict[str, Any]) -> bool:
        return self.keeps(line["step"]) or self._stays(line)
