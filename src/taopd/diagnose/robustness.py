"""The Q3 gap by compatibility proxy and K, and mean gains over the checkpoints of a run.

Source: docs/math.md, "The diagnostic", support-proxy robustness.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from taopd.diagnose.bootstrap import group_means
from taopd.diagnose.features import (
    DEFAULTS,
    PROXIES,
    AnalysisSettings,
    Tokens,
    TokenTable,
    discover_ks,
    proxy_column,
)
from taopd.diagnose.quadrants import q3_gap, quantile_groups
from taopd.errors import DataError

CURVE_GROUPS = ("all tokens", "Q3", "Q3 high C", "Q3 low C")


def robustness(
    tokens: Tokens,
    settings: AnalysisSettings = DEFAULTS,
    *,
    ks: Sequence[int] | None = None,
    proxies: Sequence[str] | None = None,
    groups: Sequence[int] = (3,),
) -> pd.DataFrame:
    """The table of `q3_gap` for every proxy and K; `proxy` and `k` of the settings are not read.

    Default: every K, and every proxy that the table has for all of them. Named ones must be there.

    Raises:
        DataError: as `token_features`, or if the table has no proxy at all.
    """
    table = TokenTable.of(tokens)
    ks = discover_ks(table.tokens) if ks is None else tuple(ks)
    if proxies is None:
        names = set(table.tokens.columns)
        proxies = [name for name in PROXIES if names.issuperset(proxy_column(name, k) for k in ks)]
    if not proxies or not ks:
        raise DataError("the token table has no compatibility proxy; score the bank first")
    tables = [
        q3_gap(table, replace(settings, k=k, proxy=proxy), groups=groups)
        for proxy in proxies
        for k in ks
    ]
    joined = pd.concat(tables, ignore_index=True)
    joined.attrs = {**tables[-1].attrs, "ks": ks, "proxies": tuple(proxies)}
    return joined


def gain_curve(
    checkpoints: Sequence[tuple[int, Tokens]], settings: AnalysisSettings = DEFAULTS
) -> pd.DataFrame:
    """Mean gain over checkpoints: all tokens, Q3, and the top and bottom third of C in Q3.

    `checkpoints`: (optimizer step, token table of the one bank with that checkpoint's gains). One row
    per (step, group): value with low, high, num, n, n_excluded, num_clusters, unit, note. The groups
    come from features measured before training. They are the same tokens at every step, except
    those with a non-finite gain.

    Raises:
        DataError: without checkpoints, or as `token_features`.
    """
    if not checkpoints:
        raise DataError("no checkpoints: a gain curve needs at least one (step, token table)")
    tables = []
    for step, tokens in sorted(checkpoints, key=lambda pair: pair[0]):
        features = TokenTable.of(tokens).features(settings)
        # bool [N, 4] in the order of CURVE_GROUPS
        inside = features.table["quadrant"].to_numpy() == 3
        members = np.zeros((len(inside), len(CURVE_GROUPS)), dtype=bool)
        members[:, 0], members[:, 1] = True, inside
        split = quantile_groups(features.table["c"].to_numpy()[inside], 3)
        if split is not None:
            members[inside, 2], members[inside, 3] = split[0] == 2, split[0] == 0
        clusters = features.clusters, features.num_clusters
        boot = group_means(features.gain(), members, *clusters, **settings.bootstrap)
        low, high = boot.interval()
        num = members.sum(axis=0)
        columns = {"step": step, "group": CURVE_GROUPS, "num": num, "value": boot.value}
        columns |= {"low": low, "high": high, **features.facts}
        columns["note"] = np.where(num > 0, boot.note, "no such tokens")
        tables.append(pd.DataFrame(columns).drop(columns=["k", "proxy"]))
    table = pd.concat(tables, ignore_index=True)
    table.attrs = dict(features.table.attrs)
    return table
