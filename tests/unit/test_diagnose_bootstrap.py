"""Cluster bootstrap. Oracles: brute-force resampling of rows, and arithmetic by hand."""

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.diagnose.bootstrap import (
    Bootstrap,
    cluster_bootstrap,
    cluster_codes,
    cluster_products,
    cluster_sums,
    group_means,
    ratios,
    resample_counts,
)
from taopd.diagnose.regression import least_squares
from taopd.errors import ConfigError, DataError, ShapeError


def rows_of_resample(codes, counts):
    """Row indices of one resample: every cluster's rows, as often as it was drawn."""
    return np.concatenate(
        [np.repeat(np.flatnonzero(codes == g), int(c)) for g, c in enumerate(counts) if c]
    )


def problem(num_clusters=7, seed=0, width=3):
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.integers(0, num_clusters, 60))
    codes[:num_clusters] = np.arange(num_clusters)
    columns = rng.standard_normal((60, width))
    target = columns @ np.arange(1, width + 1) + rng.standard_normal(60)
    return codes, columns, target


def test_means_equal_brute_force_resampling_of_rows():
    codes, columns, target = problem()
    member = columns[:, 0] > 0
    boot = group_means(
        target, np.stack([member, ~member], axis=1), codes, 7, num_resamples=50, seed=3
    )
    counts = resample_counts(7, 50, seed=3)
    for r in range(50):
        rows = rows_of_resample(codes, counts[r])
        for s, group in enumerate((member, ~member)):
            mine = rows[group[rows]]
            expected = target[mine].mean() if len(mine) else np.nan
            np.testing.assert_allclose(boot.samples[r, s], expected, rtol=1e-12)


def test_least_squares_equals_statsmodels_on_repeated_rows():
    codes, columns, target = problem()
    ones = np.ones((60, 1))
    products = cluster_products(np.concatenate([ones, columns, target[:, None]], 1), codes, 7)
    counts = resample_counts(7, 40, seed=1)
    resampled = np.einsum("rg,gab->rab", counts, products)
    slopes, r2 = least_squares(resampled, [1, 2, 3], 4)
    for r in range(40):
        rows = rows_of_resample(codes, counts[r])
        fit = sm.OLS(target[rows], sm.add_constant(columns[rows])).fit()
        np.testing.assert_allclose(slopes[r], fit.params[1:], rtol=1e-9)
        np.testing.assert_allclose(r2[r], fit.rsquared, rtol=1e-9)


def test_least_squares_equals_statsmodels_weighted_by_cluster_counts():
    codes, columns, target = problem(seed=4)
    ones = np.ones((60, 1))
    products = cluster_products(np.concatenate([ones, columns, target[:, None]], 1), codes, 7)
    counts = np.array([[2.0, 0, 1, 3, 0, 1, 0]])
    slopes, _ = least_squares(np.einsum("rg,gab->rab", counts, products), [1, 2, 3], 4)
    fit = sm.WLS(target, sm.add_constant(columns), weights=counts[0][codes]).fit()
    np.testing.assert_allclose(slopes[0], fit.params[1:], rtol=1e-9)


def test_collinear_predictors_and_constant_targets_give_nan():
    codes, columns, target = problem()
    columns[:, 2] = columns[:, 0] + columns[:, 1]
    rows = np.concatenate([np.ones((60, 1)), columns, target[:, None], np.ones((60, 1))], 1)
    total = cluster_products(rows, codes, 7).sum(0, keepdims=True)
    assert np.isnan(least_squares(total, [1, 2, 3], 4)[0]).all()
    assert np.isfinite(least_squares(total, [1, 2], 4)[0]).all()
    assert np.isnan(least_squares(total, [1, 2], 5)[1]).all()


def test_tiny_case_by_hand():
    # Clusters {1, 3} and {5}: means 3; resamples are AA 2, AB 3, BB 5.
    boot = group_means(
        np.array([1.0, 3.0, 5.0]), np.ones((3, 1)), np.array([0, 0, 1]), 2, num_resamples=400
    )
    assert boot.value[0] == 3.0
    assert set(boot.samples[:, 0]) == {2.0, 3.0, 5.0}
    assert "2 clusters only" in boot.note
    low, high = boot.interval()
    assert (low[0], high[0]) == (2.0, 5.0)


def test_one_cluster_has_a_value_and_no_interval():
    boot = group_means(np.array([1.0, 3.0]), np.ones((2, 1)), np.array([0, 0]), 1)
    assert boot.value[0] == 2.0
    assert boot.note == "one cluster only: no interval"
    assert np.isnan(boot.interval()).all() and np.isnan(boot.standard_error).all()
    assert np.isnan(boot.map(lambda means: 2 * means).interval()).all()


def test_no_cluster_and_bad_settings_are_errors():
    with pytest.raises(DataError, match="no clusters"):
        cluster_bootstrap(np.zeros((0, 2)), ratios)
    with pytest.raises(ConfigError, match="at least 2"):
        cluster_bootstrap(np.ones((3, 2)), ratios, num_resamples=1)
    with pytest.raises(ShapeError, match="one row per token"):
        cluster_sums(np.ones((3, 2)), np.zeros(4, dtype=int), 1)


def test_a_group_in_one_cluster_only_is_withheld_and_said():
    # A resample misses a given one of 10 clusters with probability 0.35.
    member = np.zeros((10, 1))
    member[0] = 1
    boot = group_means(np.arange(10.0), member, np.arange(10), 10, num_resamples=200)
    assert np.isnan(boot.interval()).all() and "undefined in" in boot.note
    assert boot.value[0] == 0.0


def test_a_few_resamples_give_no_interval_and_say_so():
    """The ends of two resamples are these two: the interval of noise around 0 left 0 out every other time."""
    values, ones = np.random.default_rng(0).normal(size=60), np.ones((60, 1))
    for num_resamples, told in ((2, False), (39, False), (40, True)):
        boot = group_means(values, ones, np.arange(60), 60, num_resamples=num_resamples)
        assert np.isfinite(boot.interval()).all() == told
        assert boot.note == (
            "" if told else f"{num_resamples} resamples only: no interval, which takes 40 or more"
        )


def test_percentile_interval_of_known_samples():
    low, high = Bootstrap(value=np.zeros(1), samples=np.arange(1001.0)[:, None]).interval()
    assert (low[0], high[0]) == pytest.approx((25.0, 975.0))


def test_standard_error_of_independent_rows_is_the_textbook_one():
    values = np.random.default_rng(2).standard_normal(400)
    boot = group_means(values, np.ones((400, 1)), np.arange(400), 400, num_resamples=4000)
    assert boot.standard_error[0] == pytest.approx(values.std() / 20, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-5, 5)), min_size=1, max_size=40),
    st.integers(0, 10),
)
def test_laws_of_the_bootstrap_of_a_mean(rows, seed):
    codes, num_clusters = cluster_codes(np.array([row[0] for row in rows]))
    values = np.array([row[1] for row in rows])

    def run(v):
        return group_means(
            v, np.ones((len(v), 1)), codes, num_clusters, num_resamples=50, seed=seed
        )

    boot = run(values)
    np.testing.assert_allclose(boot.value[0], values.mean(), atol=1e-12)
    # Same seed, same resamples; a shift and a scale move value and interval alike.
    np.testing.assert_allclose(run(2 * values + 1).samples, 2 * boot.samples + 1, atol=1e-9)
    if num_clusters > 1:
        low, high = boot.interval()
        assert values.min() - 1e-9 <= low[0] <= high[0] <= values.max() + 1e-9


def test_counts_sum_to_the_number_of_clusters_and_are_seeded():
    counts = resample_counts(9, 100, seed=5)
    assert (counts.sum(1) == 9).all()
    assert (counts == resample_counts(9, 100, seed=5)).all()
    assert (counts != resample_counts(9, 100, seed=6)).any()
