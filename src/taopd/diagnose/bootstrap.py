"""Cluster bootstrap of functions of sums over tokens.

Tokens of one prompt are correlated, so prompts are resampled, not tokens. Every statistic of the
diagnostic (means, differences of means, least squares) is a function of sums over tokens. The sums
of resample r are `counts[r] @ sums` with multinomial counts per cluster. One matrix product gives
all resamples, exactly (the tests resample rows by brute force). Cut points, normalization and kept
sets stay fixed across resamples.

Why not `scipy.stats.bootstrap`: it resamples rows, and calls the statistic on data, not on sums.

Limits: with fewer than `FEW_CLUSTERS` clusters percentile intervals are too narrow; the note says
so, and `method="expanded"` corrects it for means. With one cluster the bounds are NaN, with a note.

Source: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8; BCa:
Efron, "Better Bootstrap Confidence Intervals" (1987).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from taopd.errors import DataError, ShapeError, require, require_known

Statistic = Callable[[Float[np.ndarray, "R M"]], Float[np.ndarray, "R S"]]
"""Sums of R resamples to S statistics each; NaN where a resample leaves one undefined."""

LEVEL = 0.95
METHODS = ("percentile", "bca", "expanded")
FEW_CLUSTERS = 20
"""Below this many clusters a note warns; the usual rule of thumb is 20 to 50."""
FEWEST_RESAMPLES = 40
"""Below this many no sample lies beyond either end of a 95 % interval, and there is none."""
MAX_UNDEFINED = 0.05
"""Share of resamples in which a statistic may be undefined before its interval is withheld."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """A bootstrap of S statistics: values, resamples and intervals, in the unit of the statistic.

    Aligned example, two statistics:

        value     .12   .30
        low       .07   nan     the second one is undefined in too many resamples
        high      .16   nan
    """

    value: Float[np.ndarray, " S"]
    samples: Float[np.ndarray, "R S"]
    """R = 0 with one cluster."""
    jackknife: Float[np.ndarray, "G S"]
    """Each cluster left out once; read by BCa only."""
    num_clusters: int
    method: str = "percentile"
    note: str = ""

    @property
    def standard_error(self) -> Float[np.ndarray, " S"]:
        return np.ma.masked_invalid(self.samples).std(axis=0, ddof=1).filled(np.nan)

    def interval(
        self, level: float = LEVEL
    ) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        """Low and high ends; NaN with one cluster, too few resamples or too many undefined ones."""
        if self.method == "bca":
            return bca_interval(self.value, self.samples, self.jackknife, level=level)
        if self.method == "expanded":
            level = expanded_level(self.num_clusters, level)
        return percentile_interval(self.samples, level=level)

    def columns(self) -> dict[str, Float[np.ndarray, " S"]]:
        """Value, interval and standard error as columns of a table."""
        low, high = self.interval()
        error = self.standard_error
        return {"value": self.value, "low": low, "high": high, "standard_error": error}

    def map(
        self, function: Callable[[Float[np.ndarray, "R S"]], Float[np.ndarray, "R U"]]
    ) -> "Bootstrap":
        """The bootstrap of a function of the statistics, on the same resamples (paired)."""
        return replace(
            self,
            value=function(self.value[None])[0],
            samples=function(self.samples),
            jackknife=function(self.jackknife),
        )


def cluster_codes(clusters: np.ndarray) -> tuple[Int[np.ndarray, " N"], int]:
    """Dense codes 0..G-1 in ascending order of the labels, and G."""
    labels, codes = np.unique(np.asarray(clusters), return_inverse=True)
    return codes.reshape(-1), len(labels)


def cluster_sums(
    values: Float[np.ndarray, "N M"], codes: Int[np.ndarray, " N"], num_clusters: int
) -> Float[np.ndarray, "G M"]:
    """Column sums within each cluster; 0 for a cluster without rows."""
    _check_rows(values, codes)
    columns = [np.bincount(codes, weights=column, minlength=num_clusters) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((num_clusters, 0))


def cluster_products(
    values: Float[np.ndarray, "N M"], codes: Int[np.ndarray, " N"], num_clusters: int
) -> Float[np.ndarray, "G M M"]:
    """Cross products X'X within each cluster, the sufficient statistics of least squares."""
    _check_rows(values, codes)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(num_clusters + 1))
    rows = np.ascontiguousarray(values[order], dtype=np.float64)
    products = np.zeros((num_clusters, values.shape[1], values.shape[1]))
    for cluster in range(num_clusters):  # one product per prompt, not per token
        block = rows[bounds[cluster] : bounds[cluster + 1]]
        products[cluster] = block.T @ block
    return products


def resample_counts(
    num_clusters: int, num_resamples: int, *, seed: int = 0
) -> Float[np.ndarray, "R G"]:
    """Multinomial(G, 1/G) counts of each cluster in each resample.

    The same seed gives the same counts, so statistics of different analyses of one bank are paired.
    """
    generator = np.random.default_rng(seed)
    shares = np.full(num_clusters, 1.0 / num_clusters)
    return generator.multinomial(num_clusters, shares, size=num_resamples).astype(np.float64)


def cluster_bootstrap(
    sums: Float[np.ndarray, "G M"],
    statistic: Statistic,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
) -> Bootstrap:
    """The cluster bootstrap of a function of sums over tokens.

        value = statistic(sum_g sums[g]),   sample_r = statistic(sum_g counts[r, g] sums[g])

    Raises:
        DataError: without clusters.
        ConfigError: for an unknown method, or fewer than 2 resamples.

    Example:
        >>> sums = np.array([[2.0, 1.0], [6.0, 1.0], [1.0, 1.0]])  # sum of the gain, tokens
        >>> float(cluster_bootstrap(sums, lambda s: s[:, :1] / s[:, 1:]).value[0])
        3.0
    """
    num_clusters = sums.shape[0]
    if num_clusters == 0:
        raise DataError("there are no clusters to resample: the table has no usable tokens")
    require_known("method", method, METHODS)
    require(num_resamples >= 2, "num_resamples", num_resamples, "at least 2; 1000 is usual")
    total = sums.sum(axis=0, keepdims=True)
    value = statistic(total)[0]
    samples = jackknife = np.empty((0, value.shape[0]))
    note = "one cluster only: no interval"
    if num_clusters > 1:
        samples = statistic(resample_counts(num_clusters, num_resamples, seed=seed) @ sums)
        note = _note(samples, num_clusters)
        jackknife = statistic(total - sums) if method == "bca" else jackknife
    return Bootstrap(
        value=value,
        samples=samples,
        jackknife=jackknife,
        num_clusters=num_clusters,
        method=method,
        note=note,
    )


def percentile_interval(
    samples: Float[np.ndarray, "R S"], *, level: float = LEVEL
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Equal-tailed quantiles of the defined samples of each column; NaN where too few are."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    return _quantiles(samples, lambda index, column: tails)


def bca_interval(
    value: Float[np.ndarray, " S"],
    samples: Float[np.ndarray, "R S"],
    jackknife: Float[np.ndarray, "G S"],
    *,
    level: float = LEVEL,
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Bias-corrected and accelerated quantiles; NaN where the correction is undefined."""
    normal = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])

    def tails(index: int, column: np.ndarray) -> np.ndarray | None:
        below = (column < value[index]).mean() + 0.5 * (column == value[index]).mean()
        spread = jackknife[:, index].mean() - jackknife[:, index]
        scale = 6.0 * (spread**2).sum() ** 1.5
        if not 0 < below < 1 or not np.isfinite(scale) or scale == 0:
            return None
        bias, acceleration = stats.norm.ppf(below), (spread**3).sum() / scale
        shifted = bias + normal
        return stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))

    return _quantiles(samples, tails)


def _quantiles(
    samples: Float[np.ndarray, "R S"],
    tails: Callable[[int, np.ndarray], Sequence[float] | np.ndarray | None],
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Two quantiles of the defined samples of each column, at the tails that a function gives for it."""
    num_resamples, num_statistics = samples.shape
    low, high = np.full(num_statistics, np.nan), np.full(num_statistics, np.nan)
    for index in range(num_statistics):
        column = samples[np.isfinite(samples[:, index]), index]
        enough = num_resamples >= FEWEST_RESAMPLES
        if not enough or len(column) < (1 - MAX_UNDEFINED) * num_resamples:
            continue
        ends = tails(index, column)
        if ends is not None:
            low[index], high[index] = np.quantile(column, ends)
    return low, high


def expanded_level(num_clusters: int, level: float = LEVEL) -> float:
    """The wider level at which percentiles of G clusters behave as a t interval does.

        1 - 2 Phi(-sqrt(G / (G - 1)) t_{G-1}),   Hesterberg, "What Teachers Should Know about the
        Bootstrap", Am. Stat. 69 (2015), section 5.3

    Example:
        >>> round(expanded_level(10), 3), round(expanded_level(300), 3)
        (0.983, 0.951)
    """
    if num_clusters < 2:
        return level
    factor = np.sqrt(num_clusters / (num_clusters - 1))
    quantile = factor * stats.t.ppf((1 + level) / 2, num_clusters - 1)
    return float(1 - 2 * stats.norm.cdf(-quantile))


def ratios(sums: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R S"]:
    """Means from (sum, count, sum, count, ...) columns; NaN where a count is 0."""
    counts = sums[:, 1::2]
    return np.divide(sums[:, ::2], counts, out=np.full_like(counts, np.nan), where=counts > 0)


def group_means(
    values: Float[np.ndarray, " N"],
    weights: np.ndarray,
    codes: Int[np.ndarray, " N"],
    num_clusters: int,
    **settings,
) -> Bootstrap:
    """Weighted mean of the values for each column of weights [N, S], resampled together.

    Weights may be booleans (membership), or how often a token was drawn. Settings as
    `cluster_bootstrap`.
    """
    columns = np.empty((len(values), 2 * weights.shape[1]))
    columns[:, ::2], columns[:, 1::2] = weights * values[:, None], weights
    return cluster_bootstrap(cluster_sums(columns, codes, num_clusters), ratios, **settings)


def _note(samples: np.ndarray, num_clusters: int) -> str:
    notes = []
    if len(samples) < FEWEST_RESAMPLES:
        return f"{len(samples)} resamples only: no interval, which takes {FEWEST_RESAMPLES} or more"
    if num_clusters < FEW_CLUSTERS:
        notes.append(f"{num_clusters} clusters only: the interval is likely too narrow")
    undefined = int((~np.isfinite(samples)).any(axis=1).sum())
    if undefined:
        notes.append(f"undefined in {undefined} of {len(samples)} resamples")
    return "; ".join(notes)


def _check_rows(values: np.ndarray, codes: np.ndarray) -> None:
    if values.ndim != 2 or values.shape[0] != codes.shape[0]:
        raise ShapeError(
            f"values: expected [N={codes.shape[0]}, M], got {list(values.shape)}; one row per token"
        )
