"""R8-R18: the released selector, against the oracle and by rule number."""

import math

import oracle_lists as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_tables import budgets, random_table, table_of, tables
from torch.testing import assert_close

from taopd.distributed.collectives import quantiles
from taopd.errors import ConfigError
from taopd.selectors import REFERENCE_NAMES, SELECTORS, Selector, normalized_view, select
from taopd.selectors.formulas import entropy
from taopd.selectors.normalize import normalize

Q3_NAMES = tuple(name for name in SELECTORS if name.startswith("q3"))


@given(tables(), st.sampled_from(oracle.ORACLE_METHODS), budgets, st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=300)
def test_reference_rules_match_the_oracle(table, method, budget, min_keep, data):
    how = data.draw(st.sampled_from(["quantile", "minmax", "none"]))
    gamma = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    if len(table) == 0:
        return
    columns = (table.disagreement, table.compatibility, table.entropy)
    scored = oracle.scores(*(column.tolist() for column in columns), how)
    rows = (table.completion.tolist(), table.position.tolist(), table.valid.tolist())
    expected = oracle.select(scored, method, budget, min_keep, *rows, gamma=gamma)
    ours = select(
        table,
        selector=REFERENCE_NAMES[method],
        budget=budget,
        min_keep=min_keep,
        normalization=how,
        gamma=gamma,
        rules="reference",
    )
    assert ours.kept.tolist() == expected
    assert ours.quadrant.tolist() == scored["quadrant"]


def test_r8_masked_rows_set_the_scale_and_non_finite_values_become_zero():
    table = table_of([(d, 1.0, 0.0, 0, i, i < 3) for i, d in enumerate((0.0, 1.0, 2.0, 8.0))])
    reference = normalized_view(table, normalization="minmax", rules="reference")
    paper = normalized_view(table, normalization="minmax")
    assert reference.d.tolist() == [0, 1 / 8, 2 / 8, 1]
    assert_close(paper.d, torch.tensor([0, 0.5, 1, 0], dtype=torch.float64))
    values = torch.tensor([1.0, math.nan, 3.0, math.inf], dtype=torch.float64)
    everyone = torch.ones(4, dtype=torch.bool)
    ours = normalize(values, everyone, normalization="minmax", rules="reference")
    assert ours.tolist() == [0, 0, 1, 0]


def test_r8_a_spread_below_the_limit_is_zero():
    values = torch.tensor([1.0, 1.0 + 1e-13], dtype=torch.float64)
    everyone = torch.ones(2, dtype=torch.bool)
    assert normalize(values, everyone, rules="reference").tolist() == [0, 0]


def test_r9_quantiles_interpolate_linearly():
    values = torch.arange(5, dtype=torch.float64)
    assert quantiles(values, (0.05,)) == pytest.approx([0.2])
    ours = normalize(values, torch.ones(5, dtype=torch.bool), rules="reference")
    assert_close(ours, torch.tensor([0, 2 / 9, 0.5, 7 / 9, 1], dtype=torch.float64))


def test_r10_minmax_and_none():
    values = torch.tensor([-1.0, 1.0, 3.0], dtype=torch.float64)
    everyone = torch.ones(3, dtype=torch.bool)
    minmax = normalize(values, everyone, normalization="minmax", rules="reference")
    none = normalize(values, everyone, normalization="none", rules="reference")
    assert minmax.tolist() == [0, 0.5, 1] and none.tolist() == [0, 1 / 3, 1]


def test_r11_on_the_median_counts_as_high():
    rows = [
        (float(d), 1.0, float(h), 0, i, True) for i, (d, h) in enumerate([(1, 3), (2, 2), (3, 1)])
    ]
    view = normalized_view(table_of(rows), normalization="minmax", rules="reference")
    assert view.quadrant.tolist() == [2, 1, 3]


def test_r12_a_budget_of_one_or_more_leaves_the_mask_untouched():
    table = random_table()
    for name in SELECTORS:
        ours = select(table, selector=name, budget=1.5, rules="reference", min_keep=2)
        assert torch.equal(ours.kept, table.valid)
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        select(table, budget=1.5)


@pytest.mark.parametrize("budget", [0.0, -0.1, math.nan])
@pytest.mark.parametrize("rules", ["paper", "reference"])
def test_r13_a_budget_that_is_not_positive_is_an_error(budget, rules):
    with pytest.raises(ConfigError, match="budget"):
        select(random_table(), budget=budget, rules=rules)


def test_r14_no_valid_rows_leave_the_masks_untouched():
    table = random_table(masked=2.0)
    assert not select(table, rules="reference", min_keep=3).kept.any()


def test_r15_ties_go_to_the_smaller_position_then_the_earlier_response():
    rows = [(1.0, 1.0, 1.0, r, p, True) for r in range(2) for p in range(3)]
    order = select(table_of(rows), budget=0.5, rules="reference").order.tolist()
    assert order == [0, 2, 4, 1, 3, 5]


def test_r15_ascending_ties_go_to_the_larger_position_then_the_earlier_response():
    rows = [(1.0, 1.0, 1.0, r, p, True) for r in range(2) for p in range(3)]
    lowest = Selector(name="lowest", scores=entropy, ascending=True)
    assert select(table_of(rows), selector=lowest).order.tolist() == [4, 2, 0, 5, 3, 1]


@pytest.mark.parametrize("rules", ["paper", "reference"])
def test_r16_q3_takes_its_candidates_and_nothing_else(rules):
    table = random_table(masked=0.1)
    for name in Q3_NAMES:
        ours = select(table, selector=name, budget=0.9, rules=rules)
        assert torch.equal(ours.kept, (ours.quadrant == 3) & table.valid)
        assert int(ours.kept.sum()) < ours.num_budget
        assert torch.equal(ours.order >= 0, ours.kept)


def test_r17_the_top_up_goes_by_the_soft_or_whatever_the_selector():
    rows = [(9.0, 0.1, 0.0, 0, p, True) for p in range(8)]
    rows += [(1.0, 0.7, 0.2, 1, 0, True), (0.5, 1.0, 3.0, 1, 1, True)]
    table = table_of(rows)
    options = {"selector": "divergence", "budget": 0.1, "min_keep": 1, "normalization": "minmax"}
    by_soft_or = select(table, **options, rules="reference")
    by_divergence = select(table, **options)
    assert by_soft_or.kept.nonzero().flatten().tolist() == [0, 9]
    assert by_divergence.kept.nonzero().flatten().tolist() == [0, 8]


def test_r18_a_masked_row_is_never_kept():
    table = random_table(masked=0.7)
    for name in SELECTORS:
        ours = select(table, selector=name, budget=1.0, min_keep=99, rules="reference")
        assert not (ours.kept & ~table.valid).any()
