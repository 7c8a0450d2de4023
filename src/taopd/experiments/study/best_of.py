"""The best of several learning rates: bounds of a difference of two such bests, and of an arm's spread.

mu_ar is the accuracy of arm a at rate r; R_a its number of rates. n paired units (training seeds, or
problems as means over seeds) give differences between arm a at r and arm b at q, mean m_rq, deviation s_rq:

    own best    max_r mu_ar - max_q mu_bq = max_r min_q (mu_ar - mu_bq), estimated by the same of m_rq
    low         max_r min_q [m_rq - t_{1 - alpha/(2 R_a), n-1} s_rq / sqrt(n)]
    high        min_q max_r [m_rq + t_{1 - alpha/(2 R_b), n-1} s_rq / sqrt(n)]
    p           the smallest alpha at which the interval leaves out 0
    spread      max_r mu_ar - min_q mu_aq, with the ends
                max_rq [m_rq - t_{1 - alpha/(2 R_a (R_a - 1)), n-1} s_rq / sqrt(n)], at least 0,
                max_rq [m_rq + t_{1 - alpha/2, n-1} s_rq / sqrt(n)]

Why it holds: let q* be the true best rate of b. The low end is too high only if one of the R_a
differences to q* is, each with chance alpha/(2 R_a); the same with the arms exchanged for the high end. So
the interval holds whichever rates are best, ties included, and no data are set aside for the choice. The
plain interval at the two chosen rates does not hold: the largest of five equal means lies 1.2 of its errors
too high, so the arm with more rates that are equally good, or with noisier ones, gains. Cross-fitting
(choose on half of the problems) is too short at ties, because both halves favor the same rate; a bootstrap
of a maximum is not consistent there.

Simulated coverage: docs/math.md, "Studies"; test: tests/unit/test_own_best.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from taopd.experiments.study.statistics import LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A corrected interval; None where one unit leaves it undefined.

    Aligned example: low -.02, high .09, p .31
    """

    low: float | None
    high: float | None
    p: float | None
    """Two-sided, corrected for the choice of rates, not for several comparisons."""


def between_best(
    first: Float[np.ndarray, "Ra n"],
    second: Float[np.ndarray, "Rb n"],
    *,
    level: float = LEVEL,
    least: float = 0.0,
) -> Bounds:
    """Bounds of max over rates of the one arm minus max over rates of the other, units paired.

    Args:
        least: smallest standard deviation of a difference; that of its rounding.
    """
    differences = first[:, None] - second[None]
    n = differences.shape[-1]
    if n < 2:
        return Bounds(low=None, high=None, p=None)
    means, errors = differences.mean(-1), _errors(differences, least)
    tail = (1 - level) / 2
    down, up = (float(stats.t.isf(tail / len(arm), n - 1)) for arm in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.nan_to_num(means / errors, nan=0.0)
    above = len(first) * float(stats.t.sf(scores.min(axis=1).max(), n - 1))
    below = len(second) * float(stats.t.cdf(scores.max(axis=0).min(), n - 1))
    return Bounds(
        low=float((means - down * errors).min(axis=1).max()),
        high=float((means + up * errors).max(axis=0).min()),
        p=min(1.0, 2 * above, 2 * below),
    )


def spread(
    values: Float[np.ndarray, "R n"], *, least: float = 0.0
) -> tuple[float, float | None, float | None]:
    """Best minus worst mean over the rates, with its interval.

    Example:
        >>> spread(np.array([[0.5, 0.5], [0.3, 0.3]]))
        (0.2, 0.2, 0.2)
    """
    means = values.mean(1)
    size, (count, n) = float(means.max() - means.min()), values.shape
    if n < 2 or count < 2:
        return size, None, None
    differences = values[:, None] - values[None]
    errors, tail = _errors(differences, least), (1 - LEVEL) / 2
    middle = differences.mean(-1)
    low = (middle - float(stats.t.isf(tail / (count * (count - 1)), n - 1)) * errors).max()
    high = (middle + float(stats.t.isf(tail, n - 1)) * errors).max()
    return size, max(0.0, float(low)), float(high)


def _errors(differences: np.ndarray, least: float) -> np.ndarray:
    n = differences.shape[-1]
    return np.maximum(differences.std(-1, ddof=1), least) / math.sqrt(n)
