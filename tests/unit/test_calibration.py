"""The threshold remembered over batches: against a loop over batches, and on streams of known change."""

import math

import pytest
import torch
from selector_tables import random_table, table_of

from taopd.selectors import Calibration, select
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import choose


def stream(num_batches, selector="ier", factor=1.0, **rules):
    """Kept counts of random batches, with a signal that grows by `factor` from batch to batch."""
    calibration, kept = None, []
    for seed in range(num_batches):
        table = random_table(400, 4, seed)
        table.extra["ier"].mul_(factor**seed)
        ours = select(table, selector=selector, calibration=calibration, seed=seed, **rules)
        calibration = ours.calibration
        kept.append(int(ours.kept.sum()))
    return kept


def test_the_first_batch_keeps_exactly_the_budget_and_others_on_average():
    counts = stream(200, budget=0.1, memory=0.9)
    num_valid = [int(random_table(400, 4, seed).valid.sum()) for seed in range(200)]
    assert counts[0] == math.ceil(0.1 * num_valid[0])
    assert len(set(counts)) > 10
    assert sum(counts) / sum(num_valid) == pytest.approx(0.1, rel=0.05)


def test_counts_follow_a_loop_over_batches():
    counts, threshold = stream(30, budget=0.1, memory=0.7, factor=1.02), None
    for seed, count in enumerate(counts):
        table = random_table(400, 4, seed)
        scores = sorted((1.02**seed * table.extra["ier"])[table.valid].tolist(), reverse=True)
        budget = math.ceil(0.1 * len(scores))
        expected = budget
        if threshold is not None:
            reached = sum(score >= threshold for score in scores)
            expected = min(max(reached, math.ceil(budget / 4)), 4 * budget)
        assert count == expected
        last = scores[budget - 1]
        threshold = last if threshold is None else 0.7 * threshold + 0.3 * last


def test_a_batch_with_more_to_teach_keeps_more_within_bounds():
    assert stream(6, budget=0.05, memory=0.99, factor=3.0)[-1] == 4 * 16
    poorer = stream(6, budget=0.05, memory=0.99, factor=0.2)
    assert poorer[-1] == 4


def test_scales_are_remembered_too():
    """A batch whose D is ten times that of the last is not scaled back to it."""
    rows = [(i / 10, 1.0, 0.5, 0, i, True) for i in range(100)]
    first = select(table_of(rows), selector="divergence", budget=0.1, memory=0.5)
    larger = [(10 * d, *rest) for d, *rest in rows]
    second = select(
        table_of(larger),
        selector="divergence",
        budget=0.1,
        memory=0.5,
        calibration=first.calibration,
    )
    assert first.kept.sum() == 10 and second.kept.sum() == 40
    low, high = first.calibration.scales["d"]
    expected = torch.tensor([((10 * r[0]) - low) / (high - low) for r in rows], dtype=torch.float64)
    torch.testing.assert_close(second.d, expected.clamp(0, 1))
    (own_low, own_high), (new_low, new_high) = (10 * low, 10 * high), second.calibration.scales["d"]
    assert new_low == pytest.approx((low + own_low) / 2)
    assert new_high == pytest.approx((high + own_high) / 2)


def test_without_memory_nothing_is_remembered():
    table = random_table()
    plain = select(table, budget=0.1)
    given = select(
        table, budget=0.1, calibration=Calibration(scales={"d": (0.0, 1.0)}, threshold=9.0)
    )
    assert plain.calibration is None and torch.equal(plain.kept, given.kept)


def test_an_empty_batch_hands_on_what_it_was_given():
    before = select(random_table(), budget=0.1, memory=0.5).calibration
    after = select(table_of([]), budget=0.1, memory=0.5, calibration=before)
    assert after.calibration == before


def test_choose_hands_it_on():
    args = TeachabilityConfig(
        output_dir="x", bf16=False, use_cpu=True, budget_memory=0.9, selector="bottom"
    )
    first = choose(random_table(), args, step=0, training=True)
    table = random_table(seed=3)
    second = choose(table, args, step=1, training=True, calibration=first.selection.calibration)
    expected = select(table, selector="bottom", memory=0.9, calibration=first.selection.calibration)
    assert torch.equal(second.selection.kept, expected.kept)
