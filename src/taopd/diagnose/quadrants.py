"""Gain by compatibility within quadrant Q3 (low entropy, high divergence).

Q3 holds the tokens where a confident student disagrees with the teacher. The gap is the mean gain of
the high-C group minus that of the low-C group (thirds or quartiles of C~ within Q3). The matched
version pairs each high-C token with its nearest low-C token of the same completion in standardized
(H~, D~, position), to control for these three.

Groups have fixed cut points: values on the lowest cut are low, on the highest cut high. Ties are
never split, so groups may differ in size. When a tie spans from the lowest to the highest cut there
are no groups.

Fewer Q3 tokens than groups or clusters, or no two groups, give a row with NaN bounds and the reason
in `note`, not an error: one thin proxy or K must not end a whole report.

Clusters are prompts. The published intervals resample completions (`cluster="completion"`), the
same thing with one completion per prompt and too narrow with several.

Source: docs/math.md, "The diagnostic" (published gaps +0.078 to +0.118).
"""

from collections.abc import Sequence
from typing import Any

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
from taopd.diagnose.features import DEFAULTS, AnalysisSettings, Features, Tokens, TokenTable
from taopd.errors import require

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

    Raises:
        ConfigError: for fewer than two groups.
    """
    require(num_groups >= 2, "groups", num_groups, "at least 2; thirds are 3")
    if len(values) < num_groups:
        return None
    cuts = np.quantile(values, np.arange(1, num_groups) / num_groups)
    if cuts[0] >= values.max() or cuts[-1] <= values.min():
        return None
    if num_groups > 2 and cuts[0] == cuts[-1]:
        return None
    codes = np.searchsorted(cuts, values, side="right")
    codes[values <= cuts[0]] = 0
    return codes, cuts


def q3_gap(
    tokens: Tokens, settings: AnalysisSettings = DEFAULTS, *, groups: Sequence[int] = (3, 4)
) -> pd.DataFrame:
    """High-C minus low-C mean gain inside Q3, plain and matched, for thirds and quartiles.

        plain     mean(gain | C~ in top group) - mean(gain | C~ in bottom group)
        matched   mean over high-C tokens of (gain - gain of the nearest low-C token)

    One row per (groups, version): value with low, high, standard_error; mean_high, mean_low; num_q3,
    num_high, num_low (matched: num_high pairs, num_low distinct partners), n, n_excluded,
    num_clusters, unit, note. Undecided rows have NaN bounds and say why.

    Args:
        settings: `reference`: relative gain, and tokens on the median of H belong to Q3. [P!=C]

    Raises:
        DataError: as `token_features`.
        ConfigError: for fewer than 2 groups.
    """
    features = TokenTable.of(tokens).features(settings)
    q3, clusters = features.q3
    numbers = ("value", "low", "high", "standard_error", "mean_high", "mean_low")
    rows = []
    for num_groups in groups:
        split = quantile_groups(q3["c"].to_numpy(), num_groups)
        for version in ("plain", "matched"):
            row: dict[str, object] = {
                "groups": num_groups,
                "version": version,
                **dict.fromkeys(numbers, np.nan),
                "num_q3": len(q3),
                "num_high": 0,
                "num_low": 0,
            }
            if split is None:
                row["note"] = _why_no_groups(len(q3), num_groups)
            else:
                is_high, is_low = split[0] == num_groups - 1, split[0] == 0
                row |= _gap(q3, clusters, is_high, is_low, version, features, settings)
            rows.append({**row, **features.facts})
    table = pd.DataFrame(rows)
    table.attrs = dict(features.table.attrs)
    return table


def q3_buckets(
    tokens: Tokens, settings: AnalysisSettings = DEFAULTS, *, num_buckets: int = 4
) -> pd.DataFrame:
    """Mean gain within Q3 by quantile bucket of C~, D^L and D^I.

    One row per (feature, bucket 1..num_buckets): from, to (smallest and largest value inside), num,
    value with low, high, standard_error, n, n_excluded, num_clusters, unit, note. A feature that
    cannot be cut gives one row, bucket 0, and says why. Errors as `q3_gap`.
    """
    features = TokenTable.of(tokens).features(settings)
    q3, clusters = features.q3
    rows: list[dict[str, Any]] = []
    for name in BUCKET_FEATURES:
        values = q3[name].to_numpy()
        split = quantile_groups(values, num_buckets)
        if split is None:
            note = _why_no_groups(len(q3), num_buckets)
            rows.append({"feature": name, "bucket": 0, "num": 0, "note": note})
            continue
        members = split[0][:, None] == np.arange(num_buckets)
        gain, num_clusters = q3["gain"].to_numpy(), features.num_clusters
        boot = group_means(gain, members, clusters, num_clusters, **settings.bootstrap)
        columns = boot.columns()
        for bucket in range(num_buckets):
            part = values[members[:, bucket]]
            row = {"feature": name, "bucket": bucket + 1, "num": len(part), "note": boot.note}
            if len(part):
                row |= {"from": part.min(), "to": part.max()}
            rows.append(row | {column: each[bucket] for column, each in columns.items()})
    names = ["feature", "bucket", "from", "to", "num", "value", "low", "high", "standard_error"]
    table = pd.DataFrame(
        [row | features.facts for row in rows], columns=[*names, *features.facts, "note"]
    )
    table.attrs = dict(features.table.attrs)
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
    clusters: np.ndarray,
    is_high: np.ndarray,
    is_low: np.ndarray,
    version: str,
    features: Features,
    settings: AnalysisSettings,
) -> dict[str, object]:
    """The gap of the high and the low rows, or of their matched pairs, with its bootstrap."""
    gain = q3["gain"].to_numpy()
    if version == "plain":
        high, low = np.flatnonzero(is_high), np.flatnonzero(is_low)
        members = np.column_stack([is_high, is_low])
        means = group_means(gain, members, clusters, features.num_clusters, **settings.bootstrap)
    else:
        high, low = nearest_low(q3, is_high, is_low)
        if len(high) == 0:
            return {"note": "no completion has both high-C and low-C tokens in Q3"}
        ones = np.ones(len(high))
        columns = np.stack([gain[high], ones, gain[low], ones], axis=1)
        sums = cluster_sums(columns, clusters[high], features.num_clusters)
        means = cluster_bootstrap(sums, ratios, **settings.bootstrap)
    boot = means.map(lambda values: values[:, :1] - values[:, 1:])
    row: dict[str, object] = {name: values[0] for name, values in boot.columns().items()}
    row |= {"mean_high": means.value[0], "mean_low": means.value[1], "note": boot.note}
    if len(gain) < features.num_clusters:
        few = f"{len(gain)} Q3 tokens are fewer than the {features.num_clusters} clusters"
        row |= {"low": np.nan, "high": np.nan, "note": f"undecided: {few}"}
    return row | {"num_high": len(high), "num_low": len(np.unique(low))}


def _why_no_groups(num_tokens: int, num_groups: int) -> str:
    if num_tokens < num_groups:
        return f"undecided: {num_tokens} Q3 tokens for {num_groups} groups"
    return (
        f"undecided: too many equal values to cut {num_tokens} Q3 tokens into {num_groups} groups"
    )
