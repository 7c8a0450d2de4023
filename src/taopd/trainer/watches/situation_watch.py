"""Says after the first steps in which situation a run is: teachable, within or out of reach, or ends."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from taopd.runs.limits import situation_words
from taopd.signals import Situation, situation
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.settings.methods import running

STEPS = 20
"""Optimizer steps that are looked at: later the student is another one, and most of the disagreement gone."""

logger = logging.getLogger(__name__)


class SituationWatch(TrainerCallback):
    """Adds up D by kind over the first steps, on the main process; logs the shares, and says them once.

    Args:
        record: takes (metric, value).
        foreign_ends: ids that end the teacher's texts alone.
        method: of the run, for the words; see `methods.running`.
    """

    def __init__(
        self,
        threshold: float,
        record: Callable[[str, float], None],
        foreign_ends: Sequence[int] = (),
        *,
        method: str,
    ) -> None:
        self._rule: dict[str, Any] = {"threshold": threshold, "foreign_ends": foreign_ends}
        self._record, self._method = record, method
        self._sums = Situation(0.0, 0.0, 0.0)
        self._told = self._at_most = False

    @classmethod
    def of(cls, args: TeachabilityConfig, *others: Any) -> "SituationWatch":
        """The watch of a run; `others`: record and foreign_ends."""
        return cls(args.reach_threshold, *others, method=running(args))

    def __call__(self, scored: ScoredBatch) -> None:
        """Look at one generation batch."""
        if self._told:
            return
        signals = scored.signals
        self._sums += situation(signals, **self._rule)
        # Of flat distributions both lists hold little: what they leave open may be within reach.
        self._at_most = signals.reach is None or not signals.compatibility_is_exact
        for name, share in self._sums.shares._asdict().items():
            self._record(f"situation/{name}", share)
        if scored.number >= STEPS:
            self._tell()

    def _tell(self) -> None:
        if not self._told and sum(self._sums) > 0.0:
            words = situation_words(*self._sums.shares, method=self._method, at_most=self._at_most)
            logger.info("situation: %s", words)
        self._told = True

    # -- callback ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sums, self._told = Situation(0.0, 0.0, 0.0), False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that is shorter.
        self._tell()

    def checkpoint_state(self) -> dict[str, Any]:
        """What was added up, and whether it was said."""
        return {"sums": list(self._sums), "told": self._told}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._sums, self._told = Situation(*state["sums"]), state["told"]
