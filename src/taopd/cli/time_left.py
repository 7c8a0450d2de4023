"""The time that a study has left, from the steps that its arms have done.

    left = (s sum_i (1 - share_i) + v (2 arms - begun - finished)) / arms at a time

s: seconds for all steps of an arm; v: seconds of an evaluation with the loading before it, of which an arm
has one at its begin and one at its end (those in between are part of s). v is how long the first step took to
come. s is what the other steps took, less the evaluations that came between; without that difference an arm
whose evaluation takes as long as ten steps would be said to take hours.
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
        self._first: tuple[float, float, int] | None = None
        """When the first step came: seconds, sum of the shares, evaluations behind it."""
        self._overhead = self._seconds = 0.0
        self._at_a_time = 1

    def seconds(
        self, shares: Sequence[float], finished: Sequence[bool], now: float | None = None
    ) -> float | None:
        """Seconds left, None before two steps have come.

        Args:
            shares: of every arm's steps, done in [0, 1].
            finished: the arm has its results.
        """
        now = time.monotonic() if now is None else now
        before, self._shares = self._shares or list(shares), list(shares)
        # An arm that is begun anew after an interruption loses its steps.
        gained = sum(max(0.0, b - a) for a, b in zip(before, shares, strict=True))
        ended = sum(finished)
        evaluations = sum(share > 0 for share in shares) + ended
        running = sum(share > 0 and not end for share, end in zip(shares, finished, strict=True))
        self._at_a_time = max(self._at_a_time, running)
        if gained and self._first is None:
            self._first, self._overhead = (now, sum(shares), evaluations), now - self._began
        elif gained and self._first is not None:
            since, sum_then, evaluations_then = self._first
            spent = (now - since) * self._at_a_time
            spent -= self._overhead * (evaluations - evaluations_then)
            if (steps := sum(shares) - sum_then) > 0:
                self._seconds = max(0.0, spent) / steps
        if not self._seconds:
            return None
        arms = len(shares)
        left = self._seconds * (arms - sum(shares))
        return (left + self._overhead * (2 * arms - evaluations)) / self._at_a_time
