"""Verdicts. Oracles: planted truths; the printed interval must itself lead to the printed verdict."""

import math

import numpy as np
import pytest

from taopd.diagnose import AnalysisSettings, verdicts
from taopd.diagnose.verdicts import CANNOT_TELL, FAILS, HOLDS, UNDECIDED, judge
from tests.unit.diagnose_simulation import simulate_bank


def lead_over_ties(h, d, c):
    """Within the top twentieth of D, where D~ is clipped, nothing but the position differs."""
    return np.where(d >= np.quantile(d, 0.95), 0.5, 0.0)


def find(found, start, direction="forward", unit="nats"):
    match = [
        v
        for v in found
        if v.claim.startswith(start) and v.direction == direction and v.unit == unit
    ]
    return match[0]


def test_planted_learnable_advantage_holds():
    tokens, _ = simulate_bank(num_prompts=120, length=40, learnable=0.3, incompatible=0.05)
    found = verdicts(tokens, gains=["gain_forward"])
    assert find(found, "beta_L").verdict == HOLDS
    assert find(found, "learnable disagreement beats").verdict == HOLDS
    assert find(found, "Q3").verdict == HOLDS


def test_planted_incompatible_advantage_does_not_hold():
    tokens, _ = simulate_bank(num_prompts=120, length=40, learnable=0.05, incompatible=0.3)
    found = verdicts(tokens, gains=["gain_forward"])
    assert find(found, "beta_L").verdict == FAILS
    assert find(found, "learnable disagreement beats").verdict == FAILS
    assert find(found, "Q3").verdict == FAILS
    order = find(found, "order")
    assert order.verdict == FAILS and order.high < 0


def test_nothing_planted_is_mostly_undecided():
    tokens, _ = simulate_bank(num_prompts=60, length=20, seed=5)
    found = verdicts(
        tokens, AnalysisSettings(num_resamples=300), gains=["gain_forward", "gain_reverse"]
    )
    assert sum(v.verdict == UNDECIDED for v in found) >= 17  # of 20


def published_order(h, d, c):
    """A gain that rises with D, most where D^L is at the top, and a little with H."""
    learnable = d * c
    top = learnable >= np.quantile(learnable, 0.95)
    return d + 0.3 * d * (1 - c) + 0.5 * top + 0.1 * h


def test_published_order_holds_where_it_was_planted():
    tokens, _ = simulate_bank(
        num_prompts=200, length=60, surface=published_order, noise=0.1, prompt_level=0.02
    )
    found = verdicts(tokens, gains=["gain_forward"])
    for start in ("order", "random is worst", "learnable disagreement beats"):
        same = [v for v in found if v.claim.startswith(start) and "min-max" not in v.claim]
        assert len(same) == 2
        for verdict in same:
            assert verdict.verdict == HOLDS and verdict.low > 0, verdict.sentence


@pytest.mark.parametrize("seed", range(3))
def test_verdict_follows_from_the_interval_it_prints(seed):
    tokens, _ = simulate_bank(
        num_prompts=40, length=20, learnable=0.1, incompatible=0.1 * seed, seed=seed
    )
    found = verdicts(tokens, AnalysisSettings(num_resamples=200))
    assert len(found) == 4 * 10
    for verdict in found:
        assert judge(verdict.low, verdict.high) == verdict.verdict
        assert verdict.low <= verdict.value <= verdict.high
        assert verdict.verdict in verdict.sentence and f"n = {verdict.n}" in verdict.sentence
    assert {(verdict.unit, verdict.direction) for verdict in found} == {
        ("nats", "forward"),
        ("nats", "reverse"),
        ("share", "forward"),
        ("share", "reverse"),
    }


def test_ties_are_named_where_they_decide_places():
    tokens, _ = simulate_bank(num_prompts=60, length=40, surface=lead_over_ties)
    found = verdicts(tokens, AnalysisSettings(num_resamples=100), gains=["gain_forward"])
    pairs = [v for v in found if v.claim.startswith("learnable disagreement beats")]
    assert len(pairs) == 4
    assert "divergence gave 72 of 72 places by position" in pairs[0].sentence
    assert "min-max" in pairs[2].claim and "by position" not in pairs[2].sentence


def test_two_resamples_decide_nothing_and_are_named():
    tokens, _ = simulate_bank(num_prompts=60, length=40, learnable=0.3, incompatible=0.1)
    found = verdicts(tokens, AnalysisSettings(num_resamples=2), gains=["gain_forward"])
    assert {verdict.verdict for verdict in found} == {UNDECIDED}
    assert all("2 resamples only" in verdict.sentence for verdict in found)


def test_one_prompt_decides_nothing_and_says_why():
    tokens, _ = simulate_bank(num_prompts=20, length=20, learnable=0.5)
    found = verdicts(tokens.assign(prompt=0), gains=["gain_forward"])
    for verdict in found:
        assert verdict.verdict == UNDECIDED
        assert math.isnan(verdict.low) and math.isnan(verdict.high)
        assert "one cluster only" in verdict.sentence and "no interval" in verdict.sentence


def test_no_variation_in_compatibility_cannot_be_told():
    tokens, _ = simulate_bank(num_prompts=30, length=20)
    found = verdicts(tokens.assign(compatibility_k16=0.5), gains=["gain_forward"])
    for start in ("beta_L", "Q3"):
        verdict = find(found, start)
        assert verdict.verdict == CANNOT_TELL and np.isnan(verdict.value)
        assert (
            "no estimate" in verdict.sentence
            and "0.5000 within 0.01 at 100.0 %" in verdict.sentence
        )


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e-3])
def test_nothing_holds_where_compatibility_is_saturated(spread):
    """A planted advantage that follows C's last digits: the interval would say that it holds."""
    tokens, _ = simulate_bank(num_prompts=120, length=40, learnable=0.3, incompatible=0.05)
    squeezed = tokens.assign(compatibility_k16=1 - spread * (1 - tokens["compatibility_k16"]))
    settings = AnalysisSettings(num_resamples=200)
    found = verdicts(squeezed, settings, gains=["gain_forward"])
    assert {verdict.verdict for verdict in found} == {CANNOT_TELL}
    assert all("C is saturated" in verdict.sentence for verdict in found)
    truth = find(verdicts(tokens, settings, gains=["gain_forward"]), "beta_L")
    assert truth.verdict == HOLDS and find(found, "beta_L").low > 0


def test_a_few_tokens_of_another_compatibility_are_enough_to_judge():
    tokens, _ = simulate_bank(num_prompts=60, length=40)
    rare = np.where(np.arange(len(tokens)) % 33 == 0, 0.0, 1.0)  # 3 %, the smallest budget
    found = verdicts(
        tokens.assign(compatibility_k16=rare),
        AnalysisSettings(num_resamples=100),
        gains=["gain_forward"],
    )
    assert CANNOT_TELL not in {verdict.verdict for verdict in found}


def test_reference_judges_the_relative_gain_once():
    tokens, _ = simulate_bank(num_prompts=30, length=20)
    found = verdicts(tokens, AnalysisSettings(reference=True, num_resamples=100))
    assert len(found) == 2 * 10 and {v.unit for v in found} == {"share"}
