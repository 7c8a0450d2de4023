"""Statistics of a study. Oracles: scipy's tests, statsmodels' Holm and power, and simulation."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from taopd.errors import ConfigError
from taopd.experiments.study.statistics import (
    accuracy_estimate,
    holm,
    minimum_detectable_difference,
    pooled_deviation,
    t_estimate,
)
from tests.unit.study_simulation import coverage, family_error


@pytest.mark.parametrize("n", [2, 3, 10])
def test_t_estimate_equals_scipys_paired_test(n):
    generator = np.random.default_rng(n)
    first, second = generator.normal(0.5, 0.1, (2, n))
    estimate = t_estimate(list(first - second))
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert estimate.p == pytest.approx(expected.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.standard_deviation == pytest.approx((first - second).std(ddof=1))


def test_one_seed_has_no_interval_and_none_is_an_error():
    assert t_estimate([0.3]).mean == 0.3
    assert (t_estimate([0.3]).low, t_estimate([0.3]).p) == (None, None)
    with pytest.raises(ConfigError, match="no seeds"):
        t_estimate([])


def test_equal_differences_are_not_certainty():
    """Three seeds that differ by one problem of 500 each: p must not be 0."""
    assert t_estimate([0.0, 0.0, 0.0]).p == 1.0
    assert t_estimate([0.002] * 3).p is None
    assert t_estimate([0.1] * 3).p is None  # Their mean is not 0.1 by a rounding.
    resolved = t_estimate([0.002] * 3, resolution=2**0.5 / 500)
    assert resolved.p is not None and resolved.p > 0.01


@pytest.mark.parametrize(("paired", "least"), [(False, 0.0), (True, -1.0)])
def test_an_interval_of_accuracies_stays_among_accuracies(paired, least):
    values = [0.9, 1.0, 1.0]
    assert t_estimate(values).high > 1 > accuracy_estimate(values, 100, paired=paired).low
    assert accuracy_estimate(values, 100, paired=paired).high == 1.0
    low = accuracy_estimate([least, least, least + 0.1], 100, paired=paired)
    assert low.low == least and low.mean > least


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_statsmodels(seed):
    p = np.random.default_rng(seed).random(7) ** 2
    assert holm(list(p)) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([None, *p])[0] is None and holm([None, *p])[1:] == pytest.approx(holm(list(p)))


@pytest.mark.parametrize("n", [3, 5, 20])
def test_detectable_difference_equals_statsmodels_power(n):
    found = minimum_detectable_difference(0.02, n, power=0.8)
    assert found is not None
    power = TTestPower().power(effect_size=found / 0.02, nobs=n, alpha=0.05)
    assert power == pytest.approx(0.8, abs=1e-4)
    assert minimum_detectable_difference(0.02, 1) is None


def test_pooled_deviation():
    assert pooled_deviation([3.0, None, 4.0]) == pytest.approx((12.5) ** 0.5)
    assert pooled_deviation([None]) is None


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_intervals_cover_a_known_difference_in_93_to_97_percent(num_seeds):
    assert 0.93 <= coverage(num_seeds) <= 0.97


def test_without_a_difference_at_most_6_percent_of_1000_studies_find_one():
    assert family_error(3) <= 0.06
