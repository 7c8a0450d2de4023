"""Statistics of a comparison over a few training seeds: paired t intervals, Holm, what could be detected.

Seeds are the unit: arms share a seed's prompts, their order and its random stream, so differences are
taken within a seed. With n seeds and differences d_1..d_n, mean m and standard deviation s (n - 1):

    interval     m +- t_{1-a/2, n-1} s / sqrt(n)
    p            two-sided, of t = m / (s / sqrt(n)) with n - 1 degrees of freedom
    Holm         sort p ascending; adjusted p_(i) = max_{j<=i} min(1, (k - j + 1) p_(j)) of k tests
    detectable   smallest d for which that test has the given power, from the noncentral t

Why t and not a bootstrap: with 3 to 10 seeds a percentile interval is far too short, the t interval is
exact for normal differences. What it does not do: outcomes that collapse in some seeds are bimodal, no
interval from 3 seeds covers them well, so medians and the share of collapsed seeds are reported beside it.
Accuracy over N problems moves in steps of 1/N; `resolution` keeps s from being 0 by rounding alone.

Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979). Measured coverage and
error rates: docs/math.md, "Studies"; test: tests/unit/test_study_statistics.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

from taopd.errors import ConfigError

LEVEL = 0.95
POWER = 0.8
"""Chance of a significant test at the minimum detectable difference; the usual choice."""
_ROUNDING = 1e-12
"""Of equal values the deviation, as a share of their mean, is rounding below this."""
_QUADRATURE = 4096
"""Equally likely values of the chi-square; power is right to 1e-5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over n seeds in the unit of the values; None where n = 1 leaves it undefined.

    Aligned example: mean .031, low .012, high .050, standard_deviation .012, n 4, p .014
    """

    mean: float
    low: float | None
    high: float | None
    standard_deviation: float | None
    n: int
    p: float | None
    """Two-sided, of mean = 0, before any correction."""


def t_estimate(values: Sequence[float], *, resolution: float = 0.0) -> Estimate:
    """Mean, t interval and p value of one sample; of paired differences for a comparison.

    Args:
        resolution: step in which a value moves (sqrt(2)/N for a difference of two accuracies over N
            problems); the standard deviation is at least that of its rounding, resolution / sqrt(12).

    Example:
        >>> e = t_estimate([0.1, 0.2, 0.3])
        >>> round(e.mean, 3), round(e.low, 3), round(e.high, 3), round(e.p, 3)
        (0.2, -0.048, 0.448, 0.074)

    Raises:
        ConfigError: without values.
    """
    n = len(values)
    if n == 0:
        raise ConfigError("no values to average: the arm has no seeds")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, low=None, high=None, standard_deviation=None, n=1, p=None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if spread <= _ROUNDING * abs(mean):
        spread = 0.0  # 0.1 three times has a mean of 0.1 + 1e-17.
    spread = max(spread, resolution / math.sqrt(12.0))
    error = spread / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    # The same difference in every seed: no scale to judge it by.
    p: float | None = 1.0 if mean == 0 else None
    if error > 0:
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Estimate(
        mean=mean, low=mean - half, high=mean + half, standard_deviation=spread, n=n, p=p
    )


def accuracy_estimate(
    values: Sequence[float], num_problems: int | None, *, paired: bool = False
) -> Estimate:
    """`t_estimate` of accuracies over some problems, or of `paired` differences of two: with its rounding,
    and its interval cut at what an accuracy, or a difference of two, can be.

    Args:
        num_problems: None: not known, and no rounding.
    """
    step = math.sqrt(2.0) if paired else 1.0
    estimate = t_estimate(values, resolution=step / num_problems if num_problems else 0.0)
    return cut(estimate, -1.0 if paired else 0.0)


def cut(estimate: Estimate, least: float) -> Estimate:
    """The estimate with its interval cut at what is possible, `least` to 1."""
    return replace(estimate, low=cut_end(estimate.low, least), high=cut_end(estimate.high, least))


def cut_end(end: float | None, least: float) -> float | None:
    """One end of an interval likewise; None stays."""
    return None if end is None else min(1.0, max(least, end))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm-adjusted p values in the order given; None stays None and is not counted as a test.

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[index] = running
    return adjusted


def minimum_detectable_difference(
    standard_deviation: float, n: int, *, alpha: float = 1 - LEVEL, power: float = POWER
) -> float | None:
    """Smallest true difference that a two-sided paired t test over n seeds finds with this power.

        power = P(|T| > t_{1-alpha/2, n-1}),  T noncentral t, n - 1 df, noncentrality d sqrt(n) / s

    None with fewer than two seeds.

    Example:
        >>> round(minimum_detectable_difference(1.0, 3), 2), round(minimum_detectable_difference(1.0, 10), 2)
        (3.26, 1.0)
    """
    return None if n < 2 else _detectable_effect(n, alpha, power) * standard_deviation


@lru_cache(maxsize=256)
def _detectable_effect(n: int, alpha: float, power: float) -> float:
    """In standard deviations. Power is averaged over the deviation that the sample shows, because scipy's
    noncentral t gives NaN in its lower tail with few degrees of freedom."""
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    shares = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    bounds = critical * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))

    def missing(noncentrality: float) -> float:
        found = stats.norm.sf(bounds - noncentrality) + stats.norm.cdf(-bounds - noncentrality)
        return float(found.mean()) - power

    upper = critical
    while missing(upper) < 0:
        upper *= 2
    return float(optimize.brentq(missing, 0.0, upper)) / math.sqrt(n)


def pooled_deviation(deviations: Sequence[float | None]) -> float | None:
    """Root mean square of the known standard deviations; None if there are none."""
    known = [deviation for deviation in deviations if deviation is not None]
    return math.sqrt(math.fsum(d * d for d in known) / len(known)) if known else None


def wilson(
    share: float, n: float, error: float | None = None, *, most: float = math.inf
) -> tuple[float, float]:
    """95 % interval of a share of n problems (Wilson); unlike mean +- error it is right at 0 and 1.

    Args:
        error: standard error of a mean over n problems of several samples each: the interval is of as many
            independent problems as would have this error. At 0 and 1, where it is 0, n counts.
        most: independent problems that there can be, the samples of all; luck may make an error smaller.

    Example:
        >>> [round(end, 3) for end in wilson(0.0, 64)]
        [0.0, 0.057]
    """
    if error:
        n = min(most, share * (1.0 - share) / error**2)
    z = float(stats.norm.ppf(0.975))
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2),
    )
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1.0, 1.0))
    return max(0.0, low) if share > 0 else 0.0, min(1.0, high) if share < 1 else 1.0
