"""The time that a study has left, from the steps that its arms have done.

    left = (s sum_i (1 - share_i) + v (2 arms - begun - finished)) / arms at a time

s: seconds for all steps of an arm. v: seconds of an evaluation with the loading before it, of which an arm
has one at its begin and one at its end; those in between are part of s. Both follow from the time of the
first step, v + s first_share, and from the time so far:

    now (arms at a time) = s sum_i share_i + v (begun + finished)

Without v an arm whose evaluation takes as long as ten steps would be said to take hours.
"""

import time
from collections.abc import Sequence


class TimeLeft:
    """Estimates the seconds left; told of every arm's share of its steps, as often as one likes.

    Args:
        now: the present, in seconds.
    """

    def __init__(self, now: float | None = None) -> None:
        self._began = time.monotonic() if now is None else now
        self._shares: list[float] = []
        self._first: tuple[float, float] | None = None
        """When the first step came, in seconds after the begin, and the share that it was."""
        self._all_steps: float | None = None
        self._before = 0.0, 0
        self._at_a_time = 1

    def seconds(
        self, shares: Sequence[float], finished: Sequence[bool], now: float | None = None
    ) -> float | None:
        """Seconds left: 0 where all arms have finished, else None before two steps have come.

        Args:
            shares: of every arm's steps, done in [0, 1].
            finished: the arm has its results.
        """
        if all(finished):
            return 0.0
        since = (time.monotonic() if now is None else now) - self._began
        before, self._shares = self._shares or list(shares), list(shares)
        # What was done before this command, and an arm that is begun anew, are not its work.
        gains = [b - a for a, b in zip(before, shares, strict=True) if b > a]
        begun = [share > 0 for share in shares]
        evaluations = sum(begun) + sum(finished)
        running = sum(here and not end for here, end in zip(begun, finished, strict=True))
        self._at_a_time = max(self._at_a_time, running)
        if gains and self._first is None:
            self._first = since, max(gains)
            self._before = sum(shares) - sum(gains), evaluations - len(gains)
        if self._first is None:
            return None
        first, share = self._first
        done = sum(shares) - self._before[0]
        counted = evaluations - self._before[1]
        if gains and done > share * counted + 1e-9:
            spent = since * self._at_a_time - first * counted
            self._all_steps = max(0.0, spent) / (done - share * counted)
        if self._all_steps is None:
            return None
        evaluation = max(0.0, first - self._all_steps * share)
        arms = len(shares)
        left = self._all_steps * (arms - sum(shares)) + evaluation * (2 * arms - evaluations)
        return left / self._at_a_time
