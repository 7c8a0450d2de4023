"""From the token table of a bank to the normalized features that every analysis reads.

What: one row per completion token with its gain and the features of the student BEFORE training.
`token_features` checks the columns, counts and leaves out rows with a NaN or an infinity (never
silently: `attrs["n_excluded"]`, `attrs["excluded"]` by column), and normalizes with the selectors'
own code, so that an analysis and a training run mean the same thing by D~.

Rows are left out before anything is normalized: all tables of one gain column describe the same
tokens.

[P!=C] `reference=True` takes the released tools' choices: the gain is relative, G / KL before;
normalization follows R8-R10 (no epsilon); and H <= median counts as low, so Q3 has the tokens on
the median of H. Not reproduced in any mode: predictors measured after training.

Source: METHOD sections 2 and 4; arXiv 2605.26844, eq. 1, 5, 11, 12.
"""

import re

import numpy as np
import pandas as pd
import torch

from taopd.errors import ConfigError, DataError, suggest
from taopd.selectors import normalized_view
from taopd.signals import SignalTable

GAINS = ("gain_forward", "gain_forward_share", "gain_reverse", "gain_reverse_share")
"""Gain columns: nats per token, and as a share of the initial KL, of either direction."""
PROXIES = {
    "mass": "compatibility",
    "bound": "bound",
    "set": "overlap",
    "jaccard": "jaccard",
    "bc": "bc",
}
"""Compatibility proxy by name, and the column that holds it (with `_k<K>` after it)."""
CLUSTERS = ("prompt", "completion")
SHARED = ("completion", "prompt", "position", "entropy", "teacher_entropy")
EXTRA = {
    "teacher_entropy": "teacher_entropy",
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "student_logprob": "student_logprobs",
    "teacher_logprob": "teacher_logprobs",
}
"""Columns that a selector finds as signals, where the table has them, and the names they have in training."""


def discover_ks(tokens: pd.DataFrame) -> tuple[int, ...]:
    """Every K the table has a disagreement for, ascending.

    Raises:
        DataError: if there is none.
    """
    found = [re.fullmatch(r"disagreement_k(\d+)", str(name)) for name in tokens.columns]
    ks = sorted(int(match.group(1)) for match in found if match)
    if not ks:
        raise DataError("the token table has no disagreement_k<K> column; score the bank first")
    return tuple(ks)


def discover_gains(tokens: pd.DataFrame) -> tuple[str, ...]:
    """The gain columns that the table has, in the order of `GAINS`.

    Raises:
        DataError: if there is none.
    """
    gains = tuple(name for name in GAINS if name in tokens.columns)
    if not gains:
        raise DataError(
            f"the token table has no gain column ({', '.join(GAINS)}); "
            "measure the gain of a checkpoint first"
        )
    return gains


def gain_unit(gain: str) -> str:
    """The unit of a gain column: "share" (of the initial KL) or "nats"."""
    return "share" if gain.endswith("_share") else "nats"


def gain_direction(gain: str) -> str:
    """Which KL a gain column measures: "forward", KL(teacher || student), or "reverse"."""
    return "reverse" if gain.startswith("gain_reverse") else "forward"


def gain_column(gain: str, *, reference: bool = False) -> str:
    """The gain column an analysis reads: with `reference` always the relative one. [P!=C]"""
    return f"{gain}_share" if reference and gain_unit(gain) == "nats" else gain


def token_features(
    tokens: pd.DataFrame,
    *,
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    reference: bool = False,
) -> pd.DataFrame:
    """Usable tokens in the order (completion, position) with gain, H~, D~, C~, D^L, D^I, quadrant.

        learnable = D~ C~,   incompatible = D~ (1 - C~),   quadrant by the medians of H~ and D~

    `attrs`: n, n_excluded, excluded (rows per column with a non-finite value), gain, unit, k, proxy,
    reference. [P!=C] `reference`: see the module.

    Raises:
        DataError: no rows, a missing column, the same position twice, or no usable row.
        ConfigError: for an unknown proxy.
    """
    num_rows = len(tokens)
    tokens, excluded = _usable(tokens, _columns(k, proxy, gain, reference))
    table = signal_table_of(tokens, k=k, proxy=proxy)
    view = normalized_view(table, rules="reference" if reference else "paper")
    h, d, c = (getattr(view, name).numpy() for name in "hdc")
    quadrant = view.quadrant.numpy()
    if reference:
        # Offline, H on the median is low; D on the median stays high.
        quadrant = 4 - 2 * (h > np.median(h)).astype(np.int8) - (d >= np.median(d)).astype(np.int8)
    features = pd.DataFrame(
        {
            "completion": tokens["completion"].to_numpy(),
            "prompt": tokens["prompt"].to_numpy(),
            "position": tokens["position"].to_numpy(),
            "gain": tokens[gain_column(gain, reference=reference)].to_numpy(np.float64),
            "teacher_entropy": tokens["teacher_entropy"].to_numpy(np.float64),
            "h": h,
            "d": d,
            "c": c,
            "learnable": d * c,
            "incompatible": d * (1 - c),
            "quadrant": quadrant,
        }
    )
    used = gain_column(gain, reference=reference)
    features.attrs = {
        "n": len(features),
        "n_excluded": num_rows - len(features),
        "excluded": excluded,
        "gain": used,
        "unit": gain_unit(used),
        "k": k,
        "proxy": proxy,
        "reference": reference,
    }
    return features


def usable_tokens(
    tokens: pd.DataFrame,
    *,
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    reference: bool = False,
) -> pd.DataFrame:
    """The rows behind `token_features`, same order, with all columns of the token table."""
    return _usable(tokens, _columns(k, proxy, gain, reference))[0]


def signal_table_of(tokens: pd.DataFrame, *, k: int = 16, proxy: str = "mass") -> SignalTable:
    """What a selector reads, from a token table in the order (completion, position)."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor(tokens[name].to_numpy(np.float64))

    return SignalTable(
        disagreement=column(f"disagreement_k{k}"),
        compatibility=column(proxy_column(proxy, k)),
        entropy=column("entropy"),
        response=torch.tensor(tokens["completion"].to_numpy(np.int64)),
        position=torch.tensor(tokens["position"].to_numpy(np.int64)),
        valid=torch.ones(len(tokens), dtype=torch.bool),
        extra={signal: column(name) for name, signal in EXTRA.items() if name in tokens.columns},
    )


def proxy_column(proxy: str, k: int) -> str:
    """The column of a compatibility proxy.

    Raises:
        ConfigError: for an unknown proxy.
    """
    if proxy not in PROXIES:
        raise ConfigError(f"proxy={proxy!r} is unknown.{suggest(proxy, PROXIES)}")
    return f"{PROXIES[proxy]}_k{k}"


def winsorize(values: np.ndarray, share: float) -> np.ndarray:
    """Clip to the quantiles `share` and 1 - `share` (linear interpolation); 0 changes nothing.

    Raises:
        ConfigError: if share is outside [0, 0.5).
    """
    if not 0 <= share < 0.5:
        raise ConfigError(f"winsor={share} must be in [0, 0.5); 0.01 clips 1 % at either end")
    return np.clip(values, *np.quantile(values, [share, 1 - share])) if share else values


def clusters_of(features: pd.DataFrame, cluster: str) -> np.ndarray:
    """The labels to resample by.

    Raises:
        ConfigError: for an unknown cluster.
    """
    if cluster not in CLUSTERS:
        raise ConfigError(f"cluster={cluster!r} is unknown.{suggest(cluster, CLUSTERS)}")
    return features[cluster].to_numpy()


def _columns(k: int, proxy: str, gain: str, reference: bool) -> list[str]:
    column = gain_column(gain, reference=reference)
    return [*SHARED, f"disagreement_k{k}", proxy_column(proxy, k), column]


def _usable(tokens: pd.DataFrame, columns: list[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows with finite values in `columns`, sorted; how many values were not, by column."""
    missing = [name for name in columns if name not in tokens.columns]
    if missing:
        raise DataError(
            f"the token table has no column {missing[0]!r}."
            f"{suggest(missing[0], map(str, tokens.columns))}"
        )
    if len(tokens) == 0:
        raise DataError("the token table is empty: the bank has no completion tokens")
    finite = np.isfinite(tokens[columns].to_numpy(np.float64))
    rows = finite.all(axis=1)
    excluded = {
        name: int(bad) for name, bad in zip(columns, (~finite).sum(axis=0), strict=True) if bad
    }
    if not rows.any():
        raise DataError(
            f"none of the {len(tokens)} tokens is usable; values that are NaN or infinite: "
            f"{', '.join(f'{name} {bad}' for name, bad in excluded.items())}"
        )
    kept = tokens.loc[rows].sort_values(["completion", "position"], kind="stable")
    if kept.duplicated(["completion", "position"]).any():
        twice = kept[kept.duplicated(["completion", "position"])].iloc[0]
        raise DataError(
            f"position {int(twice['position'])} of completion {int(twice['completion'])} is in the "
            "token table twice; are two banks or two checkpoints in one table?"
        )
    return kept, excluded
