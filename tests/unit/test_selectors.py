"""Scores against the paper's formulas, laws of every selector, and a user's own selector."""

import math
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_tables import budgets, random_table, table_of, tables
from torch.testing import assert_close

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.selectors import (
    REFERENCE_NAMES,
    SELECTORS,
    Selector,
    normalized_view,
    register_selector,
    resolve_selector,
    select,
)
from taopd.selectors.formulas import incompatible, teachability, teachability_entropy
from taopd.selectors.select import budget_count
from taopd.signals import SignalTable

PLAIN_NAMES = tuple(
    name for name, known in SELECTORS.items() if known.candidates is None and name != "full"
)


# 1 formulas


def test_paper_normalization_is_eq_11_over_valid_rows():
    table = random_table()
    view = normalized_view(table)
    values = table.disagreement[table.valid]
    low, high = (torch.quantile(values, q) for q in (0.05, 0.95))
    expected = ((values - low) / (high - low + 1e-12)).clamp(0, 1)
    assert_close(view.d[table.valid], expected)
    assert (view.d[~table.valid] == 0).all() and (view.quadrant[~table.valid] == 0).all()


def test_scores_read_like_the_paper():
    view = normalized_view(random_table())
    s = view.d * view.c
    assert_close(teachability(view), s)
    assert_close(incompatible(view), view.d - s)
    assert_close(teachability_entropy(view), 1 - (1 - view.h) * (1 - s))


def test_soft_or_differs_between_the_rules():
    table = random_table(masked=0.0)
    paper = select(table, selector="teachability+entropy")
    reference = select(table, selector="teachability+entropy", rules="reference")
    assert_close(paper.scores, paper.h + paper.learnable - paper.h * paper.learnable)
    soft_or = reference.h + reference.dc - reference.h * reference.dc
    assert_close(reference.scores, soft_or)
    assert not torch.allclose(paper.scores, reference.scores)


# 2 laws


@given(tables(min_valid=1), st.sampled_from(PLAIN_NAMES), budgets)
@settings(deadline=None)
def test_the_budget_is_exact_ties_included(table, name, budget):
    ours = select(table, selector=name, budget=budget)
    num_valid = int(table.valid.sum())
    assert int(ours.kept.sum()) == ours.num_budget == max(1, math.ceil(budget * num_valid))
    assert ours.kept_fraction == ours.num_budget / num_valid


@given(tables(), st.sampled_from(sorted(SELECTORS)), budgets, st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_laws_of_every_selector(table, name, budget, min_keep, paper):
    settings_ = {
        "selector": name,
        "budget": budget,
        "min_keep": min_keep,
        "rules": "paper" if paper else "reference",
    }
    ours, again = select(table, **settings_), select(table, **settings_)
    assert torch.equal(ours.kept, again.kept) and torch.equal(ours.scores, again.scores)
    assert not (ours.kept & ~table.valid).any()
    rule = SELECTORS[name]
    if not rule.weighted and rule.weights is None:
        assert torch.equal(ours.weights, ours.kept.double())
    assert (ours.weights >= 0).all() and (ours.weights[~ours.kept] == 0).all()
    assert ours.scores.isfinite().all() and ((ours.h >= 0) & (ours.h <= 1)).all()
    ranked = ours.order[ours.order >= 0].sort().values
    assert ranked.tolist() == list(range(len(ranked)))
    if budget == 1.0:
        assert torch.equal(ours.kept, table.valid)
    for completion in set(table.completion.tolist()):
        mine = table.completion == completion
        assert int((ours.kept & mine).sum()) >= min(min_keep, int((table.valid & mine).sum()))


@given(tables(min_valid=1), st.sampled_from(["entropy", "divergence"]), budgets)
@settings(deadline=None)
def test_a_monotone_transform_moves_no_rank(table, name, budget):
    """Without clipping at quantiles; the largest value is the scale of both."""
    squared = SignalTable(
        disagreement=table.disagreement**2,
        compatibility=table.compatibility,
        entropy=table.entropy**2,
        completion=table.completion,
        position=table.position,
        valid=table.valid,
    )
    one, two = (
        select(t, selector=name, budget=budget, normalization="none") for t in (table, squared)
    )
    assert torch.equal(one.kept, two.kept) and torch.equal(one.order, two.order)


DRAWN = ("random", "compatible", "selectkd")
TIED = ("prefix", "pw", "iw")  # first tokens of all responses are equal


@given(
    st.integers(0, 50),
    st.sampled_from([name for name in SELECTORS if name not in DRAWN + TIED]),
)
@settings(deadline=None, max_examples=40)
def test_order_of_rows_and_of_responses_does_not_matter_without_ties(seed, name):
    table = random_table(80, 4, seed)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(seed))
    renamed = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    shuffled = SignalTable(
        disagreement=table.disagreement[order],
        compatibility=table.compatibility[order],
        entropy=table.entropy[order],
        completion=renamed[table.completion[order]],
        position=table.position[order],
        valid=table.valid[order],
        extra={name: column[order] for name, column in table.extra.items()},
    )
    one = select(table, selector=name, budget=0.1, normalization="none")
    two = select(shuffled, selector=name, budget=0.1, normalization="none")
    assert torch.equal(one.kept[order], two.kept)


def test_random_is_unbiased_seeded_and_independent_of_the_signals():
    table = random_table(100, 4, masked=0.0)
    times = torch.zeros(100)
    for step in range(400):
        times += select(table, selector="random", budget=0.1, step=step).kept
    # binomial(400, 0.1): mean 40, standard deviation 6; five of them
    assert (times - 40).abs().max() < 30 and times.sum() == 4000
    first, other = (select(table, selector="random", seed=seed) for seed in (0, 1))
    assert not torch.equal(first.scores, other.scores)
    changed = random_table(100, 4, seed=5, masked=0.0)
    assert torch.equal(select(changed, selector="random").scores, first.scores)


@pytest.mark.parametrize("rules", ["paper", "reference"])
def test_a_column_of_equal_values_gives_zero_not_nan(rules):
    table = table_of([(1.3, 0.1, 7.7, 0, i, True) for i in range(9)])
    ours = select(table, budget=0.3, rules=rules)
    for column in (ours.h, ours.d, ours.c, ours.dc, ours.learnable, ours.incompatible):
        assert column.tolist() == [0.0] * 9
    assert ours.quadrant.tolist() == [1] * 9
    assert ours.kept.tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("rows", [[], [(1.0, 0.5, 0.2, 0, 0, False)]])
def test_nothing_to_choose_from_keeps_nothing(name, rows):
    ours = select(table_of(rows), selector=name, min_keep=1)
    assert not ours.kept.any() and ours.num_budget == ours.num_valid == 0
    assert ours.kept_fraction == 0.0 and (ours.order == -1).all()


def test_budget_is_a_plain_double_product():
    assert budget_count(0.07, 100) == 8 and budget_count(0.55, 100) == 56
    assert budget_count(0.05, 1) == 1 and budget_count(1.0, 7) == 7


def test_min_keep_uses_the_selectors_own_order_under_the_papers_rules():
    low, high = (0.1, 1.0, 9.0), (9.0, 1.0, 0.1)
    table = table_of([(*high, 0, 0, True), (*high, 0, 1, True), (*low, 1, 0, True)] * 1)
    ours = select(table, selector="divergence", budget=0.3, min_keep=1, normalization="none")
    assert ours.kept.tolist() == [True, False, True]


# 3 the user's own selector


@pytest.fixture
def registry():
    before = dict(SELECTORS)
    yield SELECTORS
    SELECTORS.clear()
    SELECTORS.update(before)


def wave(view):
    """A module-level selector, for paths."""
    return view.d * (1 - view.h)


def test_a_registered_selector_is_selected_by_name(registry):
    register_selector("mine")(wave)
    table = random_table()
    ours = select(table, selector="mine", budget=0.1)
    assert_close(ours.scores, ours.d * (1 - ours.h))
    assert torch.equal(ours.kept, select(table, selector=wave, budget=0.1).kept)
    register_selector("mine")(wave)  # a notebook cell run twice
    with pytest.raises(ConfigError, match="another name"):
        register_selector("tip")(wave)


def test_weights_of_a_weighted_selector_are_its_scores_as_they_are(registry):
    register_selector("soft", weighted=True)(teachability)
    ours = select(random_table(), selector="soft", budget=0.2)
    assert_close(ours.weights, torch.where(ours.kept, ours.learnable, 0.0))


@pytest.mark.parametrize(
    "path", ["math:tau", "math.nothing", "nowhere.at:all", "teachabilty", ":x"]
)
def test_a_path_or_name_that_leads_nowhere_is_an_error(path):
    with pytest.raises(ConfigError, match="selector"):
        resolve_selector(path)


@pytest.mark.parametrize("mistake", ["1 / 0", "undefined", "def"])
def test_a_module_that_cannot_be_run_is_named_with_its_line(tmp_path, monkeypatch, mistake):
    name = f"selectors_of_mine_{abs(hash(mistake))}"
    (tmp_path / f"{name}.py").write_text(f"import math\n\n{mistake}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"selector '{name}:sharp': importing .* raised .*line"):
        resolve_selector(f"{name}:sharp")


def test_needs_are_names_and_not_one_text(registry):
    with pytest.raises(ConfigError, match=r"'mine': needs='overlap' must be .* \('overlap',\)"):
        register_selector("mine", needs="overlap")(wave)
    assert "mine" not in SELECTORS


def test_names_and_paths():
    with pytest.raises(ConfigError, match="Did you mean 'teachability'"):
        resolve_selector("teachabilty")
    with pytest.raises(ConfigError, match="here it is 'teachability'"):
        resolve_selector("dlearn_high")
    for path in ("taopd.selectors.formulas:tip", "taopd.selectors.formulas.tip"):
        assert resolve_selector(path) is SELECTORS["tip"]
    assert set(REFERENCE_NAMES.values()) < set(SELECTORS)


def test_bad_scores_name_the_selector():
    table = random_table()

    def short(view):
        return view.d[1:]

    def broken(view):
        return view.d / 0 * 0

    def number(view):
        return 1.0

    for selector in (short, number):
        with pytest.raises(ShapeError, match=selector.__name__):
            select(table, selector=selector)
    with pytest.raises(NumericsError, match="broken"):
        select(table, selector=broken)
    negative = Selector(name="negative", scores=lambda view: -view.d - 1, weighted=True)
    with pytest.raises(NumericsError, match="negative"):
        select(table, selector=negative)


def test_nan_in_a_valid_row_is_an_error_under_the_papers_rules():
    rows = [(math.nan, 1.0, 1.0, 0, 0, True), (1.0, 1.0, 1.0, 0, 1, True)]
    with pytest.raises(NumericsError, match="D is not finite at row 0"):
        select(table_of(rows))
    assert select(table_of(rows), rules="reference", budget=1.0).kept.all()


@pytest.mark.parametrize(
    "setting", [{"min_keep": -1}, {"gamma": 1.5}, {"normalization": "zscore"}, {"rules": "mine"}]
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        select(random_table(), **setting)


def test_a_module_without_names_has_no_list_of_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "bare", ModuleType("bare"))
    with pytest.raises(ConfigError, match=r"bare has no 'score'\.$"):
        resolve_selector("bare:score")
