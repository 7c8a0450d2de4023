"""Does the Q3 gap depend on how compatibility was measured, or on when the gain was?

What: the Q3 gap for every proxy and K of the bank (`robustness`), and mean gains over the
checkpoints of a run (`gain_curve`). Both are loops over analyses defined elsewhere.

Source: METHOD section 4, support-proxy robustness.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from taopd.diagnose.bootstrap import cluster_codes, group_means
from taopd.diagnose.features import (
    PROXIES,
    clusters_of,
    discover_ks,
    proxy_column,
    token_features,
    winsorize,
)
from taopd.diagnose.quadrants import q3_gap, quantile_groups
from taopd.errors import DataError

CURVE_GROUPS = ("all tokens", "Q3", "Q3 high C", "Q3 low C")


def robustness(
    tokens: pd.DataFrame,
    *,
    ks: Sequence[int] | None = None,
    proxies: Sequence[str] | None = None,
    groups: Sequence[int] = (3,),
    **options,
) -> pd.DataFrame:
    """The table of `q3_gap`, for every proxy and K; its other options are passed on.

    Default: every K, and every proxy that the table has for all of them. Named ones must be there.

    Raises:
        DataError: as `token_features`, or if the table has no proxy at all.
    """
    ks = discover_ks(tokens) if ks is None else tuple(ks)
    if proxies is None:
        proxies = [
            name for name in PROXIES if all(proxy_column(name, k) in tokens.columns for k in ks)
        ]
    if not proxies or not ks:
        raise DataError("the token table has no compatibility proxy; score the bank first")
    tables = [
        q3_gap(tokens, k=k, proxy=proxy, groups=groups, **options) for proxy in proxies for k in ks
    ]
    table = pd.concat(tables, ignore_index=True)
    table.attrs = {**tables[-1].attrs, "ks": ks, "proxies": tuple(proxies)}
    return table


def gain_curve(
    checkpoints: Sequence[tuple[int, pd.DataFrame]],
    *,
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
    """Mean gain over checkpoints: all tokens, Q3, and the top and bottom third of C in Q3.

    `checkpoints`: (optimizer step, token table of the one bank with that checkpoint's gains). One row
    per (step, group): value with low, high, num, n, n_excluded, num_clusters, unit, note. The groups
    come from features measured before training, so they are the same tokens at every step, save
    those with a non-finite gain.

    Raises:
        DataError: without checkpoints, or as `token_features`.
    """
    if not checkpoints:
        raise DataError("no checkpoints: a gain curve needs at least one (step, token table)")
    rows = []
    for step, tokens in sorted(checkpoints, key=lambda pair: pair[0]):
        features = token_features(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
        codes, num_clusters = cluster_codes(clusters_of(features, cluster))
        members = _curve_members(features)
        boot = group_means(
            winsorize(features["gain"].to_numpy(), winsor),
            members,
            codes,
            num_clusters,
            num_resamples=num_resamples,
            seed=seed,
            method=method,
        )
        low, high = boot.interval()
        facts = {name: features.attrs[name] for name in ("gain", "unit", "n", "n_excluded")}
        for index, name in enumerate(CURVE_GROUPS):
            num = int(members[:, index].sum())
            row = {"step": step, "group": name, "num": num, "value": boot.value[index]}
            row |= {"low": low[index], "high": high[index], **facts}
            note = boot.note if num else "no such tokens"
            rows.append({**row, "num_clusters": num_clusters, "note": note})
    table = pd.DataFrame(rows)
    table.attrs = {**features.attrs, "cluster": cluster, "winsor": winsor}
    return table


def _curve_members(features: pd.DataFrame) -> np.ndarray:
    """bool [N, 4] in the order of CURVE_GROUPS."""
    inside = features["quadrant"].to_numpy() == 3
    members = np.zeros((len(features), len(CURVE_GROUPS)), dtype=bool)
    members[:, 0], members[:, 1] = True, inside
    split = quantile_groups(features["c"].to_numpy()[inside], 3)
    if split is not None:
        members[inside, 2], members[inside, 3] = split[0] == 2, split[0] == 0
    return members
