"""Decides from a few smoothed numbers whether a run is collapsing; knows no trainer.

    smoothed(x) = exponential moving average with memory `MEMORY`, corrected for its start

Every watch compares a smoothed number with a fixed bound or with the run's own beginning. Idle drift
(`taopd.signals.drift`) is the first to move in the collapses of the tiny lab. It also moves in a student that
learns fast and well, which grows surer of what it says. So drift counts only where the student's mean entropy
is above that of its first measurement, or far above the smallest since. The others are coarse and late, and
catch what these cannot see: a student that stops ending. Measured in docs/results/guard.md.
"""

import copy
from dataclasses import astuple, dataclass, field

MEMORY = 0.6
DRIFT_LIMIT = 0.1
"""Nats of idle drift per unselected token."""
OF_FIRST, OF_LEAST = 1.05, 2.0
"""A student is less sure than it was where its entropy is so many times its first, or its smallest value."""
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

    Numbers it knows, all optional: `idle_drift` and `entropy` (nats), `length` (tokens a completion),
    `bank_gain` (nats).
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._best_gain = 0.0
        self._least_entropy: float | None = None
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
        if "entropy" in smooth:
            known = (self._least_entropy, smooth["entropy"])
            self._least_entropy = min(value for value in known if value is not None)
        new = {name: text for name, text in found.items() if name not in self.fired}
        self.fired |= dict.fromkeys(new, step)
        if not self.fired and smooth.get("idle_drift", 0.0) < DRIFT_LIMIT / 2:
            self.healthy_step = step
        return list(new.values())

    def _reasons(self, smooth: dict[str, float]) -> dict[str, str]:
        found: dict[str, str] = {}
        bases = {name: self._series[name].base for name in smooth}
        if (now := smooth.get("idle_drift", 0.0)) > DRIFT_LIMIT and self._less_sure(smooth):
            found["idle_drift"] = (
                f"on tokens that are not selected the student has moved away from the initial student by "
                f"{now:.2f} nats a token (KL; limit {DRIFT_LIMIT} nats) and comes no nearer to the "
                "teacher, and it is less sure of what it says than it was: raise anchor_coef, or stop the run"
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

    def _less_sure(self, smooth: dict[str, float]) -> bool:
        """Whether entropy says so; where it is not measured nothing speaks against it."""
        if "entropy" not in smooth:
            return True
        now, first = smooth["entropy"], self._series["entropy"].start[0]
        return now > OF_FIRST * first or now > OF_LEAST * (self._least_entropy or first)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "series": {name: list(astuple(series)) for name, series in self._series.items()},
            "best_gain": self._best_gain,
            "least_entropy": self._least_entropy,
            "fired": dict(self.fired),
            "healthy_step": self.healthy_step,
        }

    def load(self, state: dict) -> None:
        """Go on from `state()`."""
        state = copy.deepcopy(state)
        self._series = {name: _Series(*each) for name, each in state["series"].items()}
        self._best_gain, self.fired = state["best_gain"], state["fired"]
        # A checkpoint of before it was kept begins anew.
        self._least_entropy = state.get("least_entropy")
        self.healthy_step = state["healthy_step"]
