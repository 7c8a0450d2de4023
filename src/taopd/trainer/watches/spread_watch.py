"""Watches the spread of C in a run: where all tokens have the same C, its scale decides by rounding alone."""

import logging
from typing import Any

from transformers import TrainerCallback

from taopd.runs.limits import SPREAD_OF_C, spread_cause
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import scales_compatibility

logger = logging.getLogger(__name__)


class SpreadWatch(TrainerCallback):
    """Warns once, in the log, when C hardly varies and the selection scales it to [0, 1] nevertheless."""

    def __init__(self, args: TeachabilityConfig) -> None:
        self._watches = scales_compatibility(args)
        self._compatibility = args.compatibility

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Read the quantiles that the selection has logged."""
        if not self._watches or not state.is_world_process_zero or not logs:
            return
        low, high = (logs.get(f"signal/compatibility/{name}") for name in ("p10", "p90"))
        if low is not None and high is not None and high - low < SPREAD_OF_C:
            self._watches = False
            logger.warning(
                "step %d: %s", state.global_step, spread_cause(low, high, self._compatibility)
            )
