"""Decomposition regression: least squares of the gain on z-scored features before training.

    baseline   H, D, H D, position, teacher entropy
    A          baseline + C
    B          baseline with D replaced by D^L and D^I

H, D, C are the normalized ones; since D^L + D^I = D~, model B contains the baseline, so its
Delta R2 is what the split adds. The claim is beta_L - beta_I > 0 in model B, with a cluster bootstrap
interval over prompts. Scales (means and standard deviations of the z-scores,
winsorizing cuts) are those of the bank and stay fixed across resamples.

Estimates and cluster-robust standard errors come from statsmodels; intervals and contrasts from the
cluster bootstrap on per-prompt cross products.

Limits: an association on one frozen bank, not an effect of selecting. A constant predictor is left
out, with a note; collinear predictors give NaN and a note.

Source: docs/math.md, "The diagnostic" (published: beta_L 0.087, beta_I 0.043, Delta R2 < 1e-3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import statsmodels.api as sm
from jaxtyping import Float
from scipy import stats

from taopd.diagnose.bootstrap import Bootstrap, cluster_bootstrap, cluster_products
from taopd.diagnose.features import (
    DEFAULTS,
    AnalysisSettings,
    Features,
    Tokens,
    TokenTable,
    discover_ks,
)
from taopd.errors import require_known

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


COLUMNS = (
    *((model, name) for model, names in MODELS.items() for name in names),
    *((model, "r2") for model in MODELS),
    ("B", CONTRAST),
    ("A", "delta_r2"),
    ("B", "delta_r2"),
)
"""The bootstrapped statistics, by model: slopes, R2, contrast, and Delta R2 against the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """The least-squares problem of one form of the gain."""

    columns: Float[np.ndarray, "N P"]
    """z-scored predictors in the order of PREDICTORS."""
    varying: tuple[bool, ...]
    """Which predictors are not constant."""
    target: Float[np.ndarray, " N"]
    clusters: np.ndarray
    num_clusters: int

    def used(self, model: str) -> list[int]:
        """Columns of the model's predictors that vary."""
        indices = [PREDICTORS.index(name) for name in MODELS[model]]
        return [index for index in indices if self.varying[index]]


def decomposition(
    tokens: Tokens,
    settings: AnalysisSettings = DEFAULTS,
    *,
    ks: Sequence[int] | None = None,
    targets: Sequence[str] = tuple(TARGETS),
) -> pd.DataFrame:
    """Coefficients, R2 and Delta R2 of the three models for every K and form of the gain.

        gain = a + sum_j beta_j z(x_j) + error

    One row per (k, target, model, term): beta and its interval in the gain's unit per standard
    deviation, cluster-robust standard_error, r2, delta_r2 (against the baseline) with its interval,
    n, n_excluded, num_clusters, note. The row of model B with term "learnable - incompatible" is the
    contrast beta_L - beta_I; its standard error is the bootstrap's.

    Args:
        settings: `k` is not read.
        ks: default: every K of the table.

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown target.
    """
    for name in targets:
        require_known("target", name, TARGETS)
    table = TokenTable.of(tokens)
    tables = []
    for k in discover_ks(table.tokens) if ks is None else ks:
        features = table.features(replace(settings, k=k))
        facts = features.facts
        for name in targets:
            problem = _problem(features, name)
            rows = pd.DataFrame(_rows(problem, _bootstrap(problem, settings)))
            unit = "rank deviations" if name == "rank" else facts["unit"]
            first = {"k": k, "gain": facts["gain"], "target": name, "unit": unit}
            last = {name: facts[name] for name in ("n", "n_excluded", "num_clusters")}
            tables.append(rows.assign(**first, **last)[[*first, *rows.columns, *last]])
    joined = pd.concat(tables, ignore_index=True)
    joined.attrs = dict(features.table.attrs)
    return joined


def least_squares(
    products: Float[np.ndarray, "R M M"], predictors: Sequence[int], target: int
) -> tuple[Float[np.ndarray, "R P"], Float[np.ndarray, " R"]]:
    """Slopes and R2 from cross products of [1, predictors, target] columns; column 0 is the 1.

        b = (X'X)^-1 X'y,   R2 = 1 - (y'y - b'X'y) / (y'y - (sum y)^2 / n)

    NaN where the predictors are collinear, the target constant, or no row is left beside the coefficients.
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
    good &= products[:, 0, 0] > len(index)  # Else every gain is fitted, and no error can be told.
    slopes[~good] = np.nan
    residual = squares - np.einsum("rp,rp->r", slopes, moment)
    r2 = 1 - np.divide(residual, total, out=np.full_like(total, np.nan), where=good)
    return slopes[:, 1:], r2


def _problem(features: Features, target: str) -> _Problem:
    table = features.table.assign(h_d=features.table["h"] * features.table["d"])
    gain = features.gain(TARGETS[target])
    columns = [table[name].to_numpy(np.float64) for name in PREDICTORS]
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
        clusters=features.clusters,
        num_clusters=features.num_clusters,
    )


def _z_score(column: np.ndarray) -> np.ndarray | None:
    """(x - mean) / standard deviation, or None for a constant."""
    if np.ptp(column) <= 1e-12 * max(1.0, float(np.abs(column).max())):
        return None
    return (column - column.mean()) / column.std()


def _bootstrap(problem: _Problem, settings: AnalysisSettings) -> Bootstrap:
    """The cluster bootstrap of the statistics named by COLUMNS."""
    ones = np.ones((len(problem.target), 1))
    rows = np.concatenate([ones, problem.columns, problem.target[:, None]], axis=1)
    products = cluster_products(rows, problem.clusters, problem.num_clusters)
    size = rows.shape[1]

    def statistic(sums: np.ndarray) -> np.ndarray:
        squares = sums.reshape(-1, size, size)
        values: dict[tuple[str, str], np.ndarray] = {}
        for model, names in MODELS.items():
            used = problem.used(model)
            beta, values[model, "r2"] = least_squares(squares, [1 + i for i in used], size - 1)
            slopes = np.full((len(squares), len(PREDICTORS)), np.nan)
            slopes[:, used] = beta
            values |= {(model, name): slopes[:, PREDICTORS.index(name)] for name in names}
            values[model, "delta_r2"] = values[model, "r2"] - values["baseline", "r2"]
        values["B", CONTRAST] = values["B", "learnable"] - values["B", "incompatible"]
        return np.stack([values[column] for column in COLUMNS], axis=1)

    sums = products.reshape(problem.num_clusters, -1)
    return cluster_bootstrap(sums, statistic, **settings.bootstrap)


def _rows(problem: _Problem, boot: Bootstrap) -> list[dict[str, object]]:
    statistics = pd.DataFrame(boot.columns(), index=pd.Index(COLUMNS)).to_dict("index")
    undefined = dict.fromkeys(("value", "low", "high"), np.nan)
    rows: list[dict[str, object]] = []
    for model, names in MODELS.items():
        r2 = statistics[model, "r2"]["value"]
        delta = statistics.get((model, "delta_r2"), undefined)
        shared = {"r2": r2, "delta_r2": delta["value"]}
        shared |= {"delta_r2_low": delta["low"], "delta_r2_high": delta["high"]}
        solvable = bool(np.isfinite(r2))
        estimates = _estimates(problem, model) if solvable else {}
        for name in (*names, CONTRAST) if model == "B" else names:
            statistic, note = statistics[model, name], boot.note
            beta, error = estimates.get(name, (np.nan, np.nan))
            if name == CONTRAST:
                beta, error = statistic["value"], statistic["standard_error"]
                note = note if np.isfinite(beta) else "beta_L or beta_I undefined"
            elif not problem.varying[PREDICTORS.index(name)]:
                note = "constant in this bank: left out"
            elif not solvable:
                note = "predictors are collinear, the gain constant, or the tokens too few: no estimate"
            row = {"model": model, "term": name, "beta": beta, "standard_error": error}
            ends = {"low": statistic["low"], "high": statistic["high"]}
            rows.append({**row, **ends, **shared, "note": note})
    return rows


def _estimates(problem: _Problem, model: str) -> dict[str, tuple[float, float]]:
    """Slope and cluster-robust standard error (NaN with one cluster) by predictor, statsmodels."""
    used = problem.used(model)
    design = sm.add_constant(problem.columns[:, used], has_constant="add")
    fit = sm.OLS(problem.target, design).fit()
    errors = np.full(len(used) + 1, np.nan)
    if problem.num_clusters > 1:
        errors = fit.get_robustcov_results(cov_type="cluster", groups=problem.clusters).bse
    estimates = zip(used, fit.params[1:], errors[1:], strict=True)
    return {PREDICTORS[index]: (float(beta), float(error)) for index, beta, error in estimates}
