"""Decides from a few smoothed numbers whether a run is collapsing; knows no trainer.

    smoothed(x) = exponential moving average with memory `MEMORY`, corrected for its start

Every watch compares a smoothed number with a fixed bound or with the run's own beginning. Idle drift
(`taopd.signals.drift`) is the first to move in the collapses of the tiny lab. It also moves in a student that
learns fast and well; there the teachable disagreement, mean D C, keeps falling, or the student grows surer of
what it says. So drift counts only where D C is above the smallest that it has been, and entropy too: what was
taught comes undone. The others are coarse and late, and catch what these cannot see: a student that stops
ending. Measured in docs/results/guard.md.
"""

import copy
from dataclasses import astuple, dataclass, field

MEMORY = 0.6
DRIFT_LIMIT = 0.1
"""Nats of idle drift per unselected token."""
ENTROPY_RISE = 0.04
"""Nats of entropy above its smallest value from which on a student has grown less sure, noise apart."""
NUM_START = 5
"""Measurements that make a run's own beginning."""


@dataclass
class _Series:
    total: float = 0.0
    weight: float = 0.0
    start: list[float] = field(default_factory=list)

    def add(self, value: float) -> float:
        self.total = MEMORY * self.total + (1.0 - MEMORY) * value
        self.weight = MEMORY * self.weight + (1.0 - MEMORY)
        if len(self.start) < NUM_START:
            self.start.append(value)
        return self.total / self.weight

    @property
    def base(self) -> float | None:
        return sum(self.start) / NUM_START if len(self.start) == NUM_START else None


class CollapseWatch:
    """Feed it numbers with `update`; it returns the reasons to worry, each once.

    Numbers it knows, all optional: `idle_drift`, `teachable` and `entropy` (nats), `length` (tokens a
    completion), `bank_gain` (nats).
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._best_gain = 0.0
        self._least: dict[str, float] = {}
        self.fired: dict[str, int] = {}
        """Name of the number, step of the warning."""
        self.healthy_step = 0
        """The last step with idle drift below half of its limit and no warning so far."""

    def update(self, step: int, values: dict[str, float]) -> list[str]:
        """The reasons that are new at this step."""
        smooth = {
            name: self._series.setdefault(name, _Series()).add(value)
            for name, value in values.items()
        }
        found = self._reasons(smooth)
        for name in {"teachable", "entropy"} & smooth.keys():
            self._least[name] = min(smooth[name], self._least.get(name, smooth[name]))
        new = {name: text for name, text in found.items() if name not in self.fired}
        self.fired |= dict.fromkeys(new, step)
        if not self.fired and smooth.get("idle_drift", 0.0) < DRIFT_LIMIT / 2:
            self.healthy_step = step
        return list(new.values())

    def _reasons(self, smooth: dict[str, float]) -> dict[str, str]:
        found: dict[str, str] = {}
        bases = {name: self._series[name].base for name in smooth}
        if (now := smooth.get("idle_drift", 0.0)) > DRIFT_LIMIT and not self._still_learns(smooth):
            found["idle_drift"] = (
                f"on tokens that are not selected the student has moved away from the initial student by "
                f"{now:.2f} nats a token (KL; limit {DRIFT_LIMIT} nats) and comes no nearer to the "
                "teacher, the disagreement that it can learn from no longer falls, and it has grown less "
                "sure of what it says: raise anchor_coef, or stop the run"
            )
        if "entropy" in smooth and (start := bases["entropy"]) and smooth["entropy"] > 2.5 * start:
            found["entropy"] = (
                f"the student's mean entropy is {smooth['entropy']:.2f} nats a token, and was {start:.2f} "
                "nats at the start: it is losing what it knew. Lower learning_rate, or raise anchor_coef"
            )
        if "length" in smooth and (start := bases["length"]):
            now = smooth["length"]
            if not 0.5 * start <= now <= 2.0 * start:
                found["length"] = (
                    f"completions have {now:.0f} tokens on average, and had {start:.0f} tokens at the "
                    "start: read a few (taopd inspect), and see the stop audit of `taopd check`"
                )
        if "bank_gain" in smooth:
            now = smooth["bank_gain"]
            self._best_gain = max(self._best_gain, now)
            if self._best_gain > 0.05 and now < 0.5 * self._best_gain:
                found["bank_gain"] = (
                    f"on the fixed contexts of the bank the student is {now:.2f} nats a token nearer to "
                    f"the teacher than at the start, and was {self._best_gain:.2f} nats nearer at its best"
                )
        return found

    def _still_learns(self, smooth: dict[str, float]) -> bool:
        """Whether D C is as small as never before, or the student about as sure as it ever was; a number that
        is not measured says nothing."""

        def at_its_least(name: str, noise: float) -> bool:
            return name in smooth and smooth[name] <= self._least.get(name, smooth[name]) + noise

        return at_its_least("teachable", 0.0) or at_its_least("entropy", ENTROPY_RISE)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "series": {name: list(astuple(series)) for name, series in self._series.items()},
            "best_gain": self._best_gain,
            "least": dict(self._least),
            "fired": dict(self.fired),
            "healthy_step": self.healthy_step,
        }

    def load(self, state: dict) -> None:
        """Go on from `state()`."""
        state = copy.deepcopy(state)
        self._series = {name: _Series(*each) for name, each in state["series"].items()}
        self._best_gain, self.fired = state["best_gain"], state["fired"]
        # A checkpoint of before it was kept begins anew.
        self._least = state.get("least", {})
        self.healthy_step = state["healthy_step"]
