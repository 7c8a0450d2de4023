"""Coverage: in how many of 500 simulated banks the 95 % interval holds the planted truth.

Oracle: the population values of `simulate_bank`. With 500 simulations the standard error of a
coverage of 95 % is 1 %, and seeds are shared by the experiments, so their errors are too. In the batch
of seeds 0 to 499 even the exact t interval of the mean covers 91.8 % (95.0 % from 1000, 96.0 % from
2000); a batch in which the exact interval is exact tells the bootstrap's error from the batch's.
"""

from functools import cache

import numpy as np
import pytest

from taopd.diagnose import (
    AnalysisSettings,
    bootstrap,
    decomposition,
    matched_banks,
    matched_differences,
    q3_gap,
)
from taopd.diagnose.bootstrap import cluster_codes, group_means
from taopd.diagnose.regression import CONTRAST
from tests.unit.diagnose_simulation import simulate_bank

NUM_SIMULATIONS = 500
FIRST_SEED = 1000
SETTINGS = AnalysisSettings(num_resamples=1000)
LOW, HIGH = 0.92, 0.98


@pytest.fixture(scope="module", autouse=True)
def resampled_once():
    """All banks are resampled with one seed, so with the same counts, whose drawing is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "resample_counts", cache(bootstrap.resample_counts))
        yield


def slopes(seed):
    tokens, truth = simulate_bank(learnable=0.3, incompatible=0.1, seed=seed)
    table = decomposition(tokens, SETTINGS, targets=["raw"])
    rows = table[table["model"] == "B"].set_index("term")
    yield "beta_L", rows.loc["learnable"], truth.learnable
    yield "beta_L - beta_I", rows.loc[CONTRAST], truth.learnable - truth.incompatible


def gaps(seed):
    tokens, truth = simulate_bank(q3_gap=0.3, seed=seed)
    table = q3_gap(tokens, SETTINGS, groups=[3]).set_index("version")
    yield "Q3 gap", table.loc["plain"], truth.q3_gap
    yield "Q3 gap, matched", table.loc["matched"], truth.q3_gap


def top_n(seed):
    # The top 5 % by D^L have a gain of 1, all others 0.2.
    tokens, _ = simulate_bank(order=(lambda h, d, c: d * c,), seed=seed)
    (bank,) = matched_banks(
        tokens, SETTINGS, budgets=[0.05], selectors=["teachability"], winsor=0.0, num_draws=100
    )
    table = matched_differences(bank, [("teachability", "random")])
    yield "teachability - random", table.iloc[0], 1 - (0.05 * 1 + 0.95 * 0.2)


def means(seed):
    tokens, _ = simulate_bank(seed=seed)
    codes, num_clusters = cluster_codes(tokens["prompt"].to_numpy())
    gain = tokens["gain_forward"].to_numpy()
    everything = np.ones((len(gain), 1))
    boot = group_means(gain, everything, codes, num_clusters, **SETTINGS.bootstrap)
    low, high = boot.interval()
    yield "mean", {"low": low[0], "high": high[0]}, 0.2


def rows_alone(seed):
    """What ignoring prompts would give: every token its own cluster."""
    tokens, _ = simulate_bank(seed=seed)
    gain = tokens["gain_forward"].to_numpy()
    everything = np.ones((len(gain), 1))
    boot = group_means(gain, everything, np.arange(len(gain)), len(gain), num_resamples=50)
    low, high = boot.interval()
    yield "mean, tokens as clusters", {"low": low[0], "high": high[0]}, 0.2


def coverage(experiment, num_simulations=NUM_SIMULATIONS):
    hits: dict[str, int] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + num_simulations):
        for name, row, truth in experiment(seed):
            hits[name] = hits.get(name, 0) + bool(row["low"] <= truth <= row["high"])
    return {name: count / num_simulations for name, count in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [slopes, gaps, top_n, means], ids=lambda f: f.__name__)
def test_intervals_cover_the_truth_as_often_as_they_say(experiment):
    found = coverage(experiment)
    print(found)
    assert all(LOW <= share <= HIGH for share in found.values()), found


def test_forgetting_the_prompts_would_be_caught():
    found = coverage(rows_alone, num_simulations=60)
    assert found["mean, tokens as clusters"] < LOW
