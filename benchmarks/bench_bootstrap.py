"""bench_bootstrap: seconds for 1,000 cluster resamples of a bank of 57,600 tokens, one CPU thread.

Measures the two statistics of the diagnostic: means of kept sets (six selectors) and the regression
contrast beta_L - beta_I with Delta R2 (three models on shared cross products), each from the token
columns to the interval, and the whole analyses around them. Not measured: reading a bank. Bound by
one pass over the tokens (cross products per prompt); the resamples themselves are small matrices.

Resampling rows by brute force checks the same code on the same input first, for a few resamples; if
it disagrees, no time is printed.

Run: python -m benchmarks.bench_bootstrap
"""

import json
import statistics

import numpy as np
import pandas as pd
import scipy
import statsmodels
import statsmodels.api as sm
import torch

from benchmarks.measuring import call_seconds, versions
from scripts.arguments import Arguments
from taopd.cli import positive
from taopd.diagnose import AnalysisSettings, decomposition, matched_top_n, q3_gap
from taopd.diagnose.bootstrap import (
    cluster_bootstrap,
    cluster_codes,
    cluster_products,
    group_means,
    resample_counts,
)
from taopd.diagnose.regression import least_squares

NUM_CHECKED = 3
TOLERANCE = 1e-9
"""Relative; the sums are added in another order; 1e-14 was measured."""
MODELS = ((1, 2, 5, 6, 7), (1, 2, 5, 6, 7, 8), (1, 3, 4, 5, 6, 7))
"""Columns of baseline, A and B below: 1 H, 2 D, 3 D^L, 4 D^I, 5 H D, 6 position, 7 teacher H, 8 C."""
TARGET = 9


def make_tokens(num_prompts: int, length: int) -> pd.DataFrame:
    """A token table with one completion per prompt."""
    rng = np.random.default_rng(0)
    num = num_prompts * length
    completion = np.repeat(np.arange(num_prompts), length)
    d, c = rng.gamma(1.0, 0.8, num), rng.beta(3, 1.5, num)
    gain = 0.1 * d * c + 0.05 * d * (1 - c) + 0.3 * rng.standard_normal(num)
    return pd.DataFrame(
        {
            "completion": completion,
            "prompt": completion,
            "position": np.tile(np.arange(length), num_prompts),
            "entropy": rng.gamma(1.5, 0.5, num),
            "teacher_entropy": rng.gamma(1.5, 0.4, num),
            "disagreement_k16": d,
            "compatibility_k16": c,
            "gain_forward": gain + 0.1 * rng.standard_normal(num_prompts)[completion],
        }
    )


def columns_of(tokens: pd.DataFrame) -> np.ndarray:
    """[N, 10]: one, eight z-scored predictors, centered gain."""
    h, d, c = (tokens[n].to_numpy() for n in ("entropy", "disagreement_k16", "compatibility_k16"))
    position, teacher = tokens["position"].to_numpy(float), tokens["teacher_entropy"].to_numpy()
    raw = [h, d, d * c, d * (1 - c), h * d, position, teacher, c]
    scaled = [(x - x.mean()) / x.std() for x in raw]
    gain = tokens["gain_forward"].to_numpy()
    return np.stack([np.ones(len(h)), *scaled, gain - gain.mean()], axis=1)


def contrast(sums: np.ndarray) -> np.ndarray:
    """beta_L - beta_I, R2 of the three models."""
    squares = sums.reshape(-1, TARGET + 1, TARGET + 1)
    fits = [least_squares(squares, model, TARGET) for model in MODELS]
    slopes = fits[2][0]
    return np.stack([slopes[:, 1] - slopes[:, 2], *(r2 for _, r2 in fits)], axis=1)


def check(rows: np.ndarray, codes: np.ndarray, num_clusters: int, kept: np.ndarray) -> float:
    """Largest relative error against statsmodels and means on rows resampled by brute force."""
    products = cluster_products(rows, codes, num_clusters).reshape(num_clusters, -1)
    settings = {"num_resamples": NUM_CHECKED, "seed": 0}
    ours = cluster_bootstrap(products, contrast, **settings).samples
    means = group_means(rows[:, TARGET], kept, codes, num_clusters, **settings).samples
    members = [np.flatnonzero(codes == cluster) for cluster in range(num_clusters)]
    worst = 0.0
    for r, counts in enumerate(resample_counts(num_clusters, NUM_CHECKED, seed=0)):
        drawn = np.concatenate(
            [np.repeat(members[g], int(times)) for g, times in enumerate(counts) if times]
        )
        fits = [sm.OLS(rows[drawn, TARGET], rows[drawn][:, [0, *model]]).fit() for model in MODELS]
        slopes = fits[2].params
        truth = np.array([slopes[2] - slopes[3], *(fit.rsquared for fit in fits)])
        mean_truth = [rows[drawn, TARGET][kept[drawn, s]].mean() for s in range(kept.shape[1])]
        assert np.abs(truth).min() > 0, "vacuous"
        worst = max(worst, float(np.abs(ours[r] / truth - 1).max()))
        worst = max(worst, float(np.abs(means[r] / np.array(mean_truth) - 1).max()))
    if not worst <= TOLERANCE:
        raise SystemExit(f"FAILED: relative error {worst:.1e} against brute force, no time printed")
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=positive, default=300)
    parser.add_argument("--length", type=positive, default=192)
    parser.add_argument("--resamples", type=positive, default=1000)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    if settings.tiny:
        settings.prompts, settings.length, settings.resamples, settings.repeats = 30, 20, 50, 2
    torch.set_num_threads(1)
    tokens = make_tokens(settings.prompts, settings.length)
    rows = columns_of(tokens)
    codes, num_clusters = cluster_codes(tokens["prompt"].to_numpy())
    kept = rows[:, 1:7] >= np.quantile(rows[:, 1:7], 0.95, axis=0)
    error = check(rows, codes, num_clusters, kept)
    options = {"num_resamples": settings.resamples}
    analysis = AnalysisSettings(num_resamples=settings.resamples)

    def regression_bootstrap() -> object:
        products = cluster_products(rows, codes, num_clusters).reshape(num_clusters, -1)
        return cluster_bootstrap(products, contrast, **options).interval()

    cases = {
        "means of 6 kept sets": lambda: group_means(
            rows[:, TARGET], kept, codes, num_clusters, **options
        ).interval(),
        "regression contrast": regression_bootstrap,
        "decomposition, raw": lambda: decomposition(tokens, analysis, targets=["raw"]),
        "decomposition, 4 forms": lambda: decomposition(tokens, analysis),
        "matched_top_n": lambda: matched_top_n(tokens, analysis),
        "q3_gap": lambda: q3_gap(tokens, analysis),
    }
    results = []
    print(f"{len(tokens):,} tokens, {num_clusters} prompts, {settings.resamples} resamples")
    print(f"{'case':<24} {'p20 s':>8} {'p50 s':>8} {'p80 s':>8}")
    for name, function in cases.items():
        times = call_seconds(function, warmup=1, repeats=settings.repeats)
        row = {
            "case": name,
            "p20_s": times[len(times) // 5],
            "p50_s": statistics.median(times),
            "p80_s": times[(4 * len(times)) // 5],
        }
        results.append(row)
        print(f"{name:<24} {row['p20_s']:8.3f} {row['p50_s']:8.3f} {row['p80_s']:8.3f}")
    document = {
        "name": "bench_bootstrap",
        "num_tokens": len(tokens),
        "num_clusters": num_clusters,
        "num_resamples": settings.resamples,
        "repeats": settings.repeats,
        "max_rel_err": error,
        "rows": results,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "statsmodels": statsmodels.__version__,
    } | versions()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
