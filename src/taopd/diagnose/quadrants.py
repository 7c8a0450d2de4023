"""Inside Q3 (low entropy, high divergence): does compatibility separate what is learned?

What: Q3 holds the tokens where a confident student disagrees with the teacher. If all disagreement
were alike, the gain there would not depend on C. The gap is the mean gain of the high-C group minus
that of the low-C group (thirds or quartiles of C~ within Q3). The matched version pairs each high-C
token with its nearest low-C token of the same completion in standardized (H~, D~, position), so that
a gap cannot come from those three.

Groups have fixed cut points: values on the lowest cut are low, on the highest cut high. Ties are
never split by an arbitrary order, so groups may differ in size; when a tie spans from the lowest to
the highest cut there are no groups.

Undecided, not an error: fewer Q3 tokens than groups, or than clusters, or no two groups, give a row
with NaN bounds and the reason in `note`, since one thin proxy or K must not end a whole report.

Clusters are prompts. The published intervals resample completions (`cluster="completion"`), the
same thing with one completion per prompt and too narrow with several.

Source: METHOD section 4 (published gaps +0.078 to +0.118).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from taopd.diagnose.bootstrap import (
    cluster_bootstrap,
    cluster_codes,
    cluster_sums,
    group_means,
    ratios,
)
from taopd.diagnose.features import clusters_of, token_features, winsorize
from taopd.errors import ConfigError

BUCKET_FEATURES = ("c", "learnable", "incompatible")
SEPARATION = 4.0
"""Distance between completions in the search tree, in diameters of the standardized cloud."""


def quantile_groups(
    values: Float[np.ndarray, " N"], num_groups: int
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " C"]] | None:
    """Group 0..num_groups-1 of every value, and the cut points; None if they do not separate.

    Example:
        >>> codes, cuts = quantile_groups(np.arange(6.0), 3)
        >>> codes.tolist()
        [0, 0, 1, 1, 2, 2]
    """
    if num_groups < 2:
        raise ConfigError(f"groups={num_groups} must be at least 2; thirds are 3")
    if len(values) < num_groups:
        return None
    cuts = np.quantile(values, np.arange(1, num_groups) / num_groups)
    if (
        cuts[0] >= values.max()
        or cuts[-1] <= values.min()
        or (num_groups > 2 and cuts[0] == cuts[-1])
    ):
        return None
    codes = np.searchsorted(cuts, values, side="right")
    codes[values <= cuts[0]] = 0
    return codes, cuts


def q3_gap(
    tokens: pd.DataFrame,
    *,
    groups: Sequence[int] = (3, 4),
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    winsor: float = 0.0,
    cluster: str = "prompt",
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
    reference: bool = False,
) -> pd.DataFrame:
    """High-C minus low-C mean gain inside Q3, plain and matched, for thirds and quartiles.

        plain     mean(gain | C~ in top group) - mean(gain | C~ in bottom group)
        matched   mean over high-C tokens of (gain - gain of the nearest low-C token)

    One row per (groups, version): value with low, high, standard_error; mean_high, mean_low; num_q3,
    num_high, num_low (matched: num_high pairs, num_low distinct partners), n, n_excluded,
    num_clusters, unit, note. Undecided rows have NaN bounds and say why.

    Args:
        winsor: share of the bank's gains clipped at either end.
        reference: relative gain, and tokens on the median of H belong to Q3. [P!=C]

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown proxy, cluster or method, or fewer than 2 groups.
    """
    features = token_features(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
    features["gain"] = winsorize(features["gain"].to_numpy(), winsor)
    codes, num_clusters = cluster_codes(clusters_of(features, cluster))
    inside = features["quadrant"].to_numpy() == 3
    q3, q3_codes = features[inside], codes[inside]
    settings = {"num_resamples": num_resamples, "seed": seed, "method": method}
    rows = []
    for num_groups in groups:
        split = quantile_groups(q3["c"].to_numpy(), num_groups)
        for version in ("plain", "matched"):
            row: dict[str, object] = {
                "groups": num_groups,
                "version": version,
                **dict.fromkeys(("value", "low", "high", "standard_error"), np.nan),
                **dict.fromkeys(("mean_high", "mean_low"), np.nan),
                "num_q3": len(q3),
                "num_high": 0,
                "num_low": 0,
            }
            if split is None:
                row["note"] = _why_no_groups(len(q3), num_groups)
            else:
                row |= _gap(q3, q3_codes, num_clusters, split[0], num_groups - 1, version, settings)
            rows.append({**row, **_facts(features, num_clusters)})
    table = pd.DataFrame(rows)
    table.attrs = {**features.attrs, "cluster": cluster, "winsor": winsor}
    return table


def q3_buckets(
    tokens: pd.DataFrame,
    *,
    num_buckets: int = 4,
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    winsor: float = 0.0,
    cluster: str = "prompt",
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
    reference: bool = False,
) -> pd.DataFrame:
    """Mean gain within Q3 by quantile bucket of C~, D^L and D^I.

    One row per (feature, bucket 1..num_buckets): from, to (smallest and largest value inside), num,
    value with low, high, standard_error, n, n_excluded, num_clusters, unit, note. A feature that
    cannot be cut gives one row, bucket 0, and says why. Arguments and errors as `q3_gap`.
    """
    features = token_features(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
    features["gain"] = winsorize(features["gain"].to_numpy(), winsor)
    codes, num_clusters = cluster_codes(clusters_of(features, cluster))
    inside = features["quadrant"].to_numpy() == 3
    q3, q3_codes = features[inside], codes[inside]
    rows = []
    for name in BUCKET_FEATURES:
        values = q3[name].to_numpy()
        split = quantile_groups(values, num_buckets)
        facts = _facts(features, num_clusters)
        if split is None:
            note = _why_no_groups(len(q3), num_buckets)
            rows.append({"feature": name, "bucket": 0, "num": 0, "note": note, **facts})
            continue
        members = split[0][:, None] == np.arange(num_buckets)
        boot = group_means(
            q3["gain"].to_numpy(),
            members,
            q3_codes,
            num_clusters,
            num_resamples=num_resamples,
            seed=seed,
            method=method,
        )
        low, high = boot.interval()
        for bucket in range(num_buckets):
            mine = values[members[:, bucket]]
            row = {"feature": name, "bucket": bucket + 1, "num": len(mine)}
            if len(mine):
                row |= {"from": mine.min(), "to": mine.max()}
            row |= {"value": boot.value[bucket], "low": low[bucket], "high": high[bucket]}
            row |= {"standard_error": boot.standard_error[bucket], "note": boot.note}
            rows.append({**row, **facts})
    columns = ["feature", "bucket", "from", "to", "num", "value", "low", "high", "standard_error"]
    table = pd.DataFrame(rows, columns=[*columns, *facts, "note"])
    table.attrs = {**features.attrs, "cluster": cluster, "winsor": winsor}
    return table


def nearest_low(
    q3: pd.DataFrame, is_high: np.ndarray, is_low: np.ndarray
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """Rows (high, low) of pairs: each high row with its nearest low row of the same completion.

    Nearest in z-scores over Q3 of (h, d, position), one search tree for all completions: they lie
    `SEPARATION` diameters apart on a fourth axis. High rows of a completion without a low row have
    no pair.
    """
    points = q3[["h", "d", "position"]].to_numpy(np.float64)
    spread = points.std(axis=0)
    points = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    completion, _ = cluster_codes(q3["completion"].to_numpy())
    step = SEPARATION * (1.0 + float(np.linalg.norm(np.ptp(points, axis=0))))
    points = np.column_stack([points, completion * step])
    high, low = np.flatnonzero(is_high), np.flatnonzero(is_low)
    if len(high) == 0 or len(low) == 0:
        return high[:0], low[:0]
    _, nearest = cKDTree(points[low]).query(points[high])
    partner = low[nearest]
    same = completion[high] == completion[partner]
    return high[same], partner[same]


def _gap(
    q3: pd.DataFrame,
    codes: np.ndarray,
    num_clusters: int,
    groups: np.ndarray,
    top: int,
    version: str,
    settings: dict,
) -> dict[str, object]:
    gain = q3["gain"].to_numpy()
    is_high, is_low = groups == top, groups == 0
    if version == "plain":
        members = np.stack([is_high, is_low], axis=1)
        means = group_means(gain, members, codes, num_clusters, **settings)
        num_high, num_low = int(is_high.sum()), int(is_low.sum())
    else:
        high, low = nearest_low(q3, is_high, is_low)
        if len(high) == 0:
            return {"note": "no completion has both high-C and low-C tokens in Q3"}
        ones = np.ones(len(high))
        columns = np.stack([gain[high], ones, gain[low], ones], axis=1)
        sums = cluster_sums(columns, codes[high], num_clusters)
        means = cluster_bootstrap(sums, ratios, **settings)
        num_high, num_low = len(high), len(np.unique(low))
    boot = means.map(lambda values: values[:, :1] - values[:, 1:])
    low_end, high_end = boot.interval()
    note = boot.note
    if len(q3) < num_clusters:
        low_end, high_end = np.array([np.nan]), np.array([np.nan])
        note = f"undecided: {len(q3)} Q3 tokens are fewer than the {num_clusters} clusters"
    return {
        "value": boot.value[0],
        "low": low_end[0],
        "high": high_end[0],
        "standard_error": boot.standard_error[0],
        "mean_high": means.value[0],
        "mean_low": means.value[1],
        "num_high": num_high,
        "num_low": num_low,
        "note": note,
    }


def _facts(features: pd.DataFrame, num_clusters: int) -> dict[str, object]:
    names = ("gain", "unit", "k", "proxy", "n", "n_excluded")
    return {**{name: features.attrs[name] for name in names}, "num_clusters": num_clusters}


def _why_no_groups(num_tokens: int, num_groups: int) -> str:
    if num_tokens < num_groups:
        return f"undecided: {num_tokens} Q3 tokens for {num_groups} groups"
    return (
        f"undecided: too many equal values to cut {num_tokens} Q3 tokens into {num_groups} groups"
    )
