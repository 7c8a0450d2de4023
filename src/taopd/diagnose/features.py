"""Normalized token features of a bank, and the settings that its analyses share.

One row per completion token: its gain, and the features of the student BEFORE training.
`token_features` checks the columns and normalizes with the selectors' own code, so that D~ of an
analysis is D~ of a training run. Rows with a NaN or an infinity are left out before anything is
normalized, and counted: `attrs["n_excluded"]`, and `attrs["excluded"]` by column.

[P!=C] `reference=True` takes the released tools' choices: the gain is relative, G / KL before;
normalization follows R8-R10 (no epsilon); and H <= median counts as low, so Q3 has the tokens on
the median of H. Not reproduced in any mode: predictors measured after training.

Source: docs/math.md; arXiv 2605.26844, eq. 1, 5, 11, 12.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from taopd.diagnose.bootstrap import cluster_codes
from taopd.errors import DataError, require, require_known, suggest
from taopd.selectors import formulas, normalized_view
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisSettings:
    """What all analyses of one bank share: the features they read, and the bootstrap.

    Raises:
        ConfigError: for an unknown proxy or cluster.
    """

    k: int = 16
    """Support size of D and C."""
    proxy: str = "mass"
    """Compatibility proxy, a key of `PROXIES`."""
    gain: str = "gain_forward"
    """Gain column, one of `GAINS`."""
    reference: bool = False
    """The released tools' choices, see the module. [P!=C]"""
    cluster: str = "prompt"
    """Unit of the bootstrap: "prompt" or "completion"."""
    num_resamples: int = 1000
    seed: int = 0
    """Of the bootstrap and of random draws."""

    def __post_init__(self) -> None:
        require_known("proxy", self.proxy, PROXIES)
        require_known("cluster", self.cluster, CLUSTERS)

    @property
    def gain_column(self) -> str:
        """The gain column that is read: with `reference` always the relative one. [P!=C]"""
        relative = self.reference and gain_unit(self.gain) == "nats"
        return f"{self.gain}_share" if relative else self.gain

    @property
    def bootstrap(self) -> dict[str, Any]:
        """Keyword arguments of `cluster_bootstrap`."""
        return {"num_resamples": self.num_resamples, "seed": self.seed}


DEFAULTS = AnalysisSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The N usable tokens of a bank under one setting, in the order (completion, position)."""

    table: pd.DataFrame
    """Columns and `attrs` as `token_features` returns them."""
    signals: SignalTable
    """The same tokens as a selector reads them."""
    clusters: Int[np.ndarray, " N"]
    """Codes 0..num_clusters-1 of prompts or completions."""
    num_clusters: int

    @property
    def facts(self) -> dict[str, Any]:
        """Columns that every table of results has."""
        names = ("gain", "unit", "k", "proxy", "n", "n_excluded")
        return {name: self.table.attrs[name] for name in names} | {
            "num_clusters": self.num_clusters
        }

    @property
    def q3(self) -> tuple[pd.DataFrame, Int[np.ndarray, " M"]]:
        """The tokens of quadrant 3, and their cluster codes."""
        inside = self.table["quadrant"].to_numpy() == 3
        return self.table[inside], self.clusters[inside]

    def gain(self, winsor: float = 0.0) -> Float[np.ndarray, " N"]:
        """The gain column, winsorized."""
        return winsorize(self.table["gain"].to_numpy(), winsor)


class TokenTable:
    """A bank's token table that computes the features of each setting once.

    Analyses take a DataFrame or a `TokenTable`; give several of them one `TokenTable` to share its features.
    """

    def __init__(self, tokens: pd.DataFrame) -> None:
        self.tokens = tokens
        self._features: dict[tuple, Features] = {}

    @staticmethod
    def of(tokens: "pd.DataFrame | TokenTable") -> "TokenTable":
        """The table itself, or a new one around a DataFrame."""
        return tokens if isinstance(tokens, TokenTable) else TokenTable(tokens)

    def features(self, settings: AnalysisSettings) -> Features:
        """The features under these settings. Raises as `token_features`."""
        column, reference = settings.gain_column, settings.reference
        key = (settings.k, settings.proxy, column, reference, settings.cluster)
        if key not in self._features:
            self._features[key] = _features(self.tokens, settings)
        return self._features[key]


Tokens = pd.DataFrame | TokenTable


def discover_ks(tokens: pd.DataFrame) -> tuple[int, ...]:
    """Every K the table has a disagreement for, ascending.

    Raises:
        DataError: if there is none.
    """
    matches = [re.fullmatch(r"disagreement_k(\d+)", str(name)) for name in tokens.columns]
    ks = sorted(int(match.group(1)) for match in matches if match)
    if not ks:
        raise DataError("the token table has no disagreement_k<K> column; score the bank first")
    return tuple(ks)


def default_k(tokens: pd.DataFrame) -> int:
    """The published K = 16 where the table has it, else its largest K."""
    ks = discover_ks(tokens)
    return 16 if 16 in ks else ks[-1]


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


def token_features(tokens: pd.DataFrame, settings: AnalysisSettings = DEFAULTS) -> pd.DataFrame:
    """Usable tokens in the order (completion, position) with gain, H~, D~, C~, D^L, D^I, quadrant.

        learnable = D~ C~,   incompatible = D~ (1 - C~),   quadrant by the medians of H~ and D~

    `attrs`: n, n_excluded, excluded (rows per column with a non-finite value), gain, unit, k, proxy,
    reference, cluster. [P!=C] `reference`: see the module.

    Raises:
        DataError: no rows, a missing column, the same position twice, or no usable row.
    """
    return TokenTable(tokens).features(settings).table


def _features(tokens: pd.DataFrame, settings: AnalysisSettings) -> Features:
    k, gain = settings.k, settings.gain_column
    columns = [*SHARED, f"disagreement_k{k}", proxy_column(settings.proxy, k), gain]
    usable, excluded = _usable(tokens, columns)

    def column(name: str) -> torch.Tensor:
        return torch.tensor(usable[name].to_numpy(np.float64))

    signals = SignalTable(
        disagreement=column(f"disagreement_k{k}"),
        compatibility=column(proxy_column(settings.proxy, k)),
        entropy=column("entropy"),
        completion=torch.tensor(usable["completion"].to_numpy(np.int64)),
        position=torch.tensor(usable["position"].to_numpy(np.int64)),
        valid=torch.ones(len(usable), dtype=torch.bool),
        extra={signal: column(name) for name, signal in EXTRA.items() if name in usable.columns},
    )
    view = normalized_view(signals, rules="reference" if settings.reference else "paper")
    h, d, c = (getattr(view, name).numpy() for name in "hdc")
    quadrant = view.quadrant.numpy()
    if settings.reference:
        # Offline, H on the median is low; D on the median stays high.
        quadrant = 4 - 2 * (h > np.median(h)).astype(np.int8) - (d >= np.median(d)).astype(np.int8)
    table = pd.DataFrame(
        {
            **{name: usable[name].to_numpy() for name in ("completion", "prompt", "position")},
            "gain": usable[gain].to_numpy(np.float64),
            "teacher_entropy": usable["teacher_entropy"].to_numpy(np.float64),
            "h": h,
            "d": d,
            "c": c,
            "learnable": formulas.teachability(view).numpy(),
            "incompatible": formulas.incompatible(view).numpy(),
            "quadrant": quadrant,
        }
    )
    table.attrs = {
        "n": len(table),
        "n_excluded": len(tokens) - len(table),
        "excluded": excluded,
        "gain": gain,
        "unit": gain_unit(gain),
        **{name: getattr(settings, name) for name in ("k", "proxy", "reference", "cluster")},
    }
    clusters, num_clusters = cluster_codes(table[settings.cluster].to_numpy())
    return Features(table=table, signals=signals, clusters=clusters, num_clusters=num_clusters)


def proxy_column(proxy: str, k: int) -> str:
    """The column of a compatibility proxy."""
    return f"{PROXIES[proxy]}_k{k}"


def winsorize(values: np.ndarray, share: float) -> np.ndarray:
    """Values clipped to the quantiles `share` and 1 - `share` (linear interpolation); 0 changes nothing.

    Raises:
        ConfigError: if share is outside [0, 0.5).
    """
    require(0 <= share < 0.5, "winsor", share, "in [0, 0.5); 0.01 clips 1 % at either end")
    return np.clip(values, *np.quantile(values, [share, 1 - share])) if share else values


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
    repeated = kept[kept.duplicated(["completion", "position"])]
    if len(repeated):
        completion, position = repeated[["completion", "position"]].iloc[0].astype(int)
        raise DataError(
            f"position {position} of completion {completion} is in the token table twice; are two "
            "banks or two checkpoints in one table?"
        )
    return kept, excluded
