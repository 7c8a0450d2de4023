"""Arms compared problem by problem: what hundreds of held-out problems say where training seeds are few.

With a_i and b_i the shares of the common seeds in which two arms get problem i right, d_i = a_i - b_i:

    difference   mean of d_1..d_N
    interval     the t interval of d_1..d_N, their deviation at least 1 / (seeds sqrt(N))

It holds for the training seeds that were run. How far another seed would move an arm only several seeds show.
The least deviation is that of one problem in one seed: models that agree everywhere are not certain to.

Source: paired differences over questions, "Adding Error Bars to Evals" (arXiv 2411.00640).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taopd.errors import DataError
from taopd.experiments.study.statistics import Estimate, cut, t_estimate

Outcome = Mapping[str, Any]


def right(outcomes: Sequence[Outcome], metric: str = "greedy") -> NDArray[np.float64] | None:
    """[N] shares of some seeds of an arm in which each problem is right at the end.

    Args:
        outcomes: with `right_<metric>_curve`, a list of (step, digits): a digit for each problem.

    Returns:
        None where that was not recorded, or the seeds were evaluated on different numbers of problems.

    Raises:
        DataError: a digit that is not 0 or 1, or none; names arm and seed.
    """
    key = f"right_{metric}_curve"
    if not all(outcome.get(key) for outcome in outcomes):
        return None
    ends = [outcome[key][-1][1] for outcome in outcomes]
    for outcome, digits in zip(outcomes, ends, strict=True):
        if set(digits) - {"0", "1"} or not digits:
            raise DataError(
                f"{outcome['name']}, seed {outcome['seed']}: {key} must hold a digit, 0 or 1, for each "
                "problem"
            )
    if len({len(digits) for digits in ends}) > 1:
        return None
    return np.array([list(map(int, digits)) for digits in ends], dtype=float).mean(axis=0)


def least_deviation(num_problems: int, num_seeds: int) -> float:
    """Deviation over problems if one problem in one seed differs."""
    return 1 / (num_seeds * math.sqrt(num_problems))


def difference(
    one: Mapping[int, Outcome], other: Mapping[int, Outcome], metric: str = "greedy"
) -> Estimate | None:
    """Accuracy of one arm less that of another, over the seeds that both have, as a share.

    Args:
        one, other: outcomes by seed.

    Returns:
        None without a common seed, or where problems cannot be paired.
    """
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    mine, theirs = (right([arm[seed] for seed in seeds], metric) for arm in (one, other))
    if mine is None or theirs is None or len(mine) != len(theirs):
        return None
    least = least_deviation(len(mine), len(seeds))
    return cut(t_estimate(list(mine - theirs), resolution=math.sqrt(12.0) * least), -1.0)
