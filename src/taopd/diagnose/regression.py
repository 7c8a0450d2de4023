"""Decomposition regression: does the learnable part of a disagreement predict gain more strongly?

What: ordinary least squares of the gain on z-scored features of the student before training.

    baseline   H, D, H D, position, teacher entropy
    A          baseline + C
    B          baseline with D replaced by D^L and D^I

H, D, C are the normalized ones; since D^L + D^I = D~, model B contains the baseline, so its
Delta R2 is what the split adds. The claim is beta_L - beta_I > 0, in model B, with an interval that
knows that tokens of one prompt are alike. Scales (means and standard deviations of the z-scores,
winsorizing cuts) are those of the bank and stay fixed across resamples.

Estimates and cluster-robust standard errors come from statsmodels; intervals and contrasts from the
cluster bootstrap on per-prompt cross products, which is why a thousand resamples are cheap.

Limits: an association on one frozen bank, not an effect of selecting. A constant predictor is left
out and said so; collinear predictors give NaN and a note, never a coefficient.

Source: METHOD section 4 (published: beta_L 0.087, beta_I 0.043, Delta R2 < 1e-3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from jaxtyping import Float
from scipy import stats

from taopd.diagnose.bootstrap import (
    Bootstrap,
    cluster_bootstrap,
    cluster_codes,
    cluster_products,
)
from taopd.diagnose.features import clusters_of, discover_ks, token_features, winsorize
from taopd.errors import ConfigError, suggest

MODELS = {
    "baseline": ("h", "d", "h_d", "position", "teacher_entropy"),
    "A": ("h", "d", "h_d", "position", "teacher_entropy", "c"),
    "B": ("h", "learnable", "incompatible", "h_d", "position", "teacher_entropy"),
}
PREDICTORS = ("h", "d", "h_d", "position", "teacher_entropy", "c", "learnable", "incompatible")
TARGETS = {"raw": 0.0, "winsorized_1": 0.01, "winsorized_5": 0.05, "rank": 0.0}
"""Form of the gain and the share clipped at either end. rank: ranks of the gain and of every
predictor, z-scored, so a coefficient is in standard deviations of the rank."""
CONTRAST = "learnable - incompatible"
SMALLEST_EIGENVALUE = 1e-10
"""Of the cross products of z-scores, relative to the largest; below it predictors are collinear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """One form of the gain: z-scored predictors in the order of PREDICTORS, and which exist."""

    columns: Float[np.ndarray, "N P"]
    varying: tuple[bool, ...]
    target: Float[np.ndarray, " N"]
    codes: np.ndarray
    num_clusters: int

    def used(self, model: str) -> list[int]:
        places = [PREDICTORS.index(name) for name in MODELS[model]]
        return [place for place in places if self.varying[place]]


def decomposition(
    tokens: pd.DataFrame,
    *,
    ks: Sequence[int] | None = None,
    proxy: str = "mass",
    gain: str = "gain_forward",
    targets: Sequence[str] = tuple(TARGETS),
    cluster: str = "prompt",
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
    reference: bool = False,
) -> pd.DataFrame:
    """Coefficients, R2 and Delta R2 of the three models for every K and form of the gain.

        gain = a + sum_j beta_j z(x_j) + error

    One row per (k, target, model, term): beta and its interval in the gain's unit per standard
    deviation, cluster-robust standard_error, r2, delta_r2 (against the baseline) with its interval,
    n, n_excluded, num_clusters, note. The row of model B with term "learnable - incompatible" is the
    contrast beta_L - beta_I; its standard error is the bootstrap's.

    Args:
        ks: default: every K of the table.
        reference: relative gain, the released code's normalization (`features`). [P!=C]

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown target, proxy, cluster or method.
    """
    for name in targets:
        if name not in TARGETS:
            raise ConfigError(f"target={name!r} is unknown.{suggest(name, TARGETS)}")
    tables = []
    for k in discover_ks(tokens) if ks is None else ks:
        features = token_features(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
        codes, num_clusters = cluster_codes(clusters_of(features, cluster))
        for name in targets:
            problem = _problem(features, name, codes, num_clusters)
            boot = _bootstrap(problem, num_resamples=num_resamples, seed=seed, method=method)
            rows = pd.DataFrame(_rows(problem, boot))
            facts = features.attrs
            unit = "rank deviations" if name == "rank" else facts["unit"]
            rows.insert(0, "k", k)
            rows.insert(1, "gain", facts["gain"])
            rows.insert(2, "target", name)
            rows.insert(3, "unit", unit)
            rows["n"], rows["n_excluded"] = facts["n"], facts["n_excluded"]
            rows["num_clusters"] = num_clusters
            tables.append(rows)
    table = pd.concat(tables, ignore_index=True)
    table.attrs = {**features.attrs, "cluster": cluster, "num_resamples": num_resamples}
    return table


def least_squares(
    products: Float[np.ndarray, "R M M"], predictors: Sequence[int], target: int
) -> tuple[Float[np.ndarray, "R P"], Float[np.ndarray, " R"]]:
    """Slopes and R2 from cross products of [1, predictors, target] columns; column 0 is the 1.

        b = (X'X)^-1 X'y,   R2 = 1 - (y'y - b'X'y) / (y'y - (sum y)^2 / n)

    NaN where the predictors are collinear or the target constant.
    """
    index = np.array([0, *predictors])
    gram = products[:, index[:, None], index[None, :]]
    moment = products[:, index, target]
    # Scaled to unit diagonal, collinearity does not depend on units or on n.
    diagonal = np.sqrt(np.maximum(np.einsum("rii->ri", gram), np.finfo(float).tiny))
    scaled = gram / diagonal[:, :, None] / diagonal[:, None, :]
    eigenvalues = np.linalg.eigvalsh(scaled)
    good = eigenvalues[:, 0] > SMALLEST_EIGENVALUE * eigenvalues[:, -1]
    scaled[~good] = np.eye(len(index))
    slopes = np.linalg.solve(scaled, (moment / diagonal)[:, :, None])[:, :, 0] / diagonal
    squares = products[:, target, target]
    total = squares - products[:, 0, target] ** 2 / np.maximum(products[:, 0, 0], 1)
    good &= total > np.finfo(float).eps * squares
    slopes[~good] = np.nan
    residual = squares - np.einsum("rp,rp->r", slopes, moment)
    r2 = 1 - np.divide(residual, total, out=np.full_like(total, np.nan), where=good)
    return slopes[:, 1:], r2


def _problem(features: pd.DataFrame, target: str, codes: np.ndarray, num_clusters: int) -> _Problem:
    raw = {name: features[name].to_numpy(np.float64) for name in PREDICTORS if name != "h_d"}
    raw["h_d"] = raw["h"] * raw["d"]
    gain = winsorize(features["gain"].to_numpy(np.float64), TARGETS[target])
    columns = [raw[name] for name in PREDICTORS]
    if target == "rank":
        columns = [stats.rankdata(column) for column in columns]
        gain = stats.rankdata(gain)
    scaled = [_z_score(column) for column in columns]
    # A shift changes no slope and no R2; without it y'y may drown the differences.
    response = gain - gain.mean()
    if target == "rank" and np.ptp(gain) > 0:
        response /= gain.std()
    return _Problem(
        columns=np.stack([np.zeros(len(gain)) if z is None else z for z in scaled], axis=1),
        varying=tuple(z is not None for z in scaled),
        target=response,
        codes=codes,
        num_clusters=num_clusters,
    )


def _z_score(column: np.ndarray) -> np.ndarray | None:
    """(x - mean) / standard deviation, or None for a constant."""
    if np.ptp(column) <= 1e-12 * max(1.0, float(np.abs(column).max())):
        return None
    return (column - column.mean()) / column.std()


def _bootstrap(problem: _Problem, *, num_resamples: int, seed: int, method: str) -> Bootstrap:
    """Columns: slopes of baseline, A, B, then R2 of the three, the contrast and two Delta R2."""
    ones = np.ones((len(problem.target), 1))
    rows = np.concatenate([ones, problem.columns, problem.target[:, None]], axis=1)
    products = cluster_products(rows, problem.codes, problem.num_clusters)
    size = rows.shape[1]

    def statistic(sums: np.ndarray) -> np.ndarray:
        squares = sums.reshape(-1, size, size)
        slopes, r2s = [], []
        for model in MODELS:
            used = problem.used(model)
            beta, r2 = least_squares(squares, [1 + place for place in used], size - 1)
            full = np.full((len(squares), len(PREDICTORS)), np.nan)
            full[:, used] = beta
            slopes.append(full[:, [PREDICTORS.index(name) for name in MODELS[model]]])
            r2s.append(r2)
        names = MODELS["B"]
        contrast = (
            slopes[2][:, names.index("learnable")] - slopes[2][:, names.index("incompatible")]
        )
        last = [*r2s, contrast, r2s[1] - r2s[0], r2s[2] - r2s[0]]
        return np.concatenate([*slopes, np.stack(last, axis=1)], axis=1)

    return cluster_bootstrap(
        products.reshape(problem.num_clusters, -1),
        statistic,
        num_resamples=num_resamples,
        seed=seed,
        method=method,
    )


def _rows(problem: _Problem, boot: Bootstrap) -> list[dict[str, object]]:
    low, high = boot.interval()
    errors = boot.standard_error
    place = sum(map(len, MODELS.values()))
    r2_place = {model: place + index for index, model in enumerate(MODELS)}
    contrast, delta_place = place + 3, {"A": place + 4, "B": place + 5}
    rows: list[dict[str, object]] = []
    start = 0
    for model, names in MODELS.items():
        shared = {
            "r2": boot.value[r2_place[model]],
            "delta_r2": np.nan,
            "delta_r2_low": np.nan,
            "delta_r2_high": np.nan,
        }
        if model in delta_place:
            at = delta_place[model]
            shared |= {"delta_r2": boot.value[at], "delta_r2_low": low[at]}
            shared["delta_r2_high"] = high[at]
        solvable = bool(np.isfinite(shared["r2"]))
        estimates = _estimates(problem, model) if solvable else {}
        for offset, name in enumerate(names):
            at = start + offset
            note = boot.note
            if not problem.varying[PREDICTORS.index(name)]:
                note = "constant in this bank: left out"
            elif not solvable:
                note = "predictors are collinear or the gain is constant: no estimate"
            beta, error = estimates.get(name, (np.nan, np.nan))
            row = {"model": model, "term": name, "beta": beta, "standard_error": error}
            rows.append({**row, "low": low[at], "high": high[at], **shared, "note": note})
        start += len(names)
        if model == "B":
            defined = bool(np.isfinite(boot.value[contrast]))
            row = {"model": model, "term": CONTRAST, "beta": boot.value[contrast]}
            row |= {"standard_error": errors[contrast]}
            row |= {"low": low[contrast], "high": high[contrast], **shared}
            rows.append({**row, "note": boot.note if defined else "beta_L or beta_I undefined"})
    return rows


def _estimates(problem: _Problem, model: str) -> dict[str, tuple[float, float]]:
    """Slope and cluster-robust standard error (NaN with one cluster) by predictor, statsmodels."""
    used = problem.used(model)
    design = sm.add_constant(problem.columns[:, used], has_constant="add")
    fit = sm.OLS(problem.target, design).fit()
    errors = np.full(len(used) + 1, np.nan)
    if problem.num_clusters > 1:
        robust = fit.get_robustcov_results(cov_type="cluster", groups=problem.codes)
        errors = robust.bse
    pairs = zip(fit.params[1:], errors[1:], strict=True)
    return {
        PREDICTORS[place]: (float(beta), float(error))
        for place, (beta, error) in zip(used, pairs, strict=True)
    }
