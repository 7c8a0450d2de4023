"""Cluster bootstrap of functions of sums over tokens.

Tokens of one prompt are correlated, so prompts are resampled, not tokens. Every statistic of the
diagnostic (means, differences of means, least squares) is a function of sums over tokens. The sums
of resample r are `counts[r] @ sums` with multinomial counts per cluster. One matrix product gives
all resamples, exactly (the tests resample rows by brute force). Cut points, normalization and kept
sets stay fixed across resamples.

Why not `scipy.stats.bootstrap`: it resamples rows, and calls the statistic on data, not on sums.

Limits: with fewer than `FEW_CLUSTERS` clusters percentile intervals are too narrow; the note says
so. With one cluster the bounds are NaN, with a note.

Source: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from taopd.errors import DataError, ShapeError, require

Statistic = Callable[[Float[np.ndarray, "R M"]], Float[np.ndarray, "R S"]]
"""Sums of R resamples to S statistics each; NaN where a resample leaves one undefined."""

LEVEL = 0.95
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
    note: str = ""

    @property
    def standard_error(self) -> Float[np.ndarray, " S"]:
        return np.ma.masked_invalid(self.samples).std(axis=0, ddof=1).filled(np.nan)

    def interval(
        self, level: float = LEVEL
    ) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        """Equal-tailed quantiles of the defined samples.

        NaN with one cluster, too few resamples or too many undefined ones.
        """
        num_resamples, num_statistics = self.samples.shape
        low, high = np.full(num_statistics, np.nan), np.full(num_statistics, np.nan)
        if num_resamples < FEWEST_RESAMPLES:
            return low, high
        for index, column in enumerate(self.samples.T):
            defined = column[np.isfinite(column)]
            if len(defined) >= (1 - MAX_UNDEFINED) * num_resamples:
                low[index], high[index] = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return low, high

    def columns(self) -> dict[str, Float[np.ndarray, " S"]]:
        """Value, interval and standard error as columns of a table."""
        low, high = self.interval()
        error = self.standard_error
        return {"value": self.value, "low": low, "high": high, "standard_error": error}

    def map(
        self, function: Callable[[Float[np.ndarray, "R S"]], Float[np.ndarray, "R U"]]
    ) -> "Bootstrap":
        """The bootstrap of a function of the statistics, on the same resamples (paired)."""
        return replace(self, value=function(self.value[None])[0], samples=function(self.samples))


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
) -> Bootstrap:
    """The cluster bootstrap of a function of sums over tokens.

        value = statistic(sum_g sums[g]),   sample_r = statistic(sum_g counts[r, g] sums[g])

    Raises:
        DataError: without clusters.
        ConfigError: for fewer than 2 resamples.

    Example:
        >>> sums = np.array([[2.0, 1.0], [6.0, 1.0], [1.0, 1.0]])  # sum of the gain, tokens
        >>> float(cluster_bootstrap(sums, lambda s: s[:, :1] / s[:, 1:]).value[0])
        3.0
    """
    num_clusters = sums.shape[0]
    if num_clusters == 0:
        raise DataError("there are no clusters to resample: the table has no usable tokens")
    require(num_resamples >= 2, "num_resamples", num_resamples, "at least 2; 1000 is usual")
    total = sums.sum(axis=0, keepdims=True)
    value = statistic(total)[0]
    samples = np.empty((0, value.shape[0]))
    note = "one cluster only: no interval"
    if num_clusters > 1:
        samples = statistic(resample_counts(num_clusters, num_resamples, seed=seed) @ sums)
        note = _note(samples, num_clusters)
    return Bootstrap(value=value, samples=samples, note=note)


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
