"""Scales and threshold remembered from batch to batch, so that a budget holds on average and not in each.

Why: with scales and a count of its own, every batch trains on its best share, however poor; here a batch with
more to teach trains on more. The first batch has nothing to remember and keeps exactly the budget.

Not remembered: the scale of a score that an expression normalizes itself.

Source: none; listed as open in the survey of the field (the paper names non-comparable batches as a limit).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks

LARGEST_CHANGE = 4
"""A batch keeps at least a quarter of its budget and at most four times as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one batch tells the next; plain numbers, for a checkpoint."""

    scales: Mapping[str, tuple[float, float]]
    """Of h, d, c and dc: the values that map to 0 and 1."""
    threshold: float
    """Score of the last row that the budget pays for."""


def calibrated_count(
    scores: Float[Tensor, " M"],
    calibration: Calibration,
    num_budget: int,
    *,
    ascending: bool,
    ranks: Ranks = ALONE,
) -> int:
    """How many of the candidates' scores reach the threshold; see `LARGEST_CHANGE`."""
    reached = scores <= calibration.threshold if ascending else scores >= calibration.threshold
    fewest = -(-num_budget // LARGEST_CHANGE)
    return min(max(ranks.total(reached.sum()), fewest), LARGEST_CHANGE * num_budget)


def updated(
    calibration: Calibration | None,
    scales: Mapping[str, tuple[float, float]],
    threshold: float,
    *,
    memory: float,
) -> Calibration:
    """memory * old + (1 - memory) * this batch, for every number; this batch where there is no old."""
    if calibration is None:
        return Calibration(scales=dict(scales), threshold=threshold)

    def mixed(old: float, new: float) -> float:
        return memory * old + (1.0 - memory) * new

    merged = {
        name: (mixed(old[0], scales[name][0]), mixed(old[1], scales[name][1]))
        if name in scales
        else old
        for name, old in calibration.scales.items()
    }
    return Calibration(
        scales={**scales, **merged}, threshold=mixed(calibration.threshold, threshold)
    )
