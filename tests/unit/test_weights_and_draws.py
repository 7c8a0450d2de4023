"""Weights, scopes, schedules and draws of a selection, by counting and by repetition."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_tables import budgets, random_table, table_of, tables

from taopd.errors import ConfigError, NumericsError
from taopd.losses import reduction_weights
from taopd.selectors import normalized_view, resolve_selector, scheduled_budget, select
from taopd.selectors.sampling import draw_rows, inclusion_probabilities

# weights


def test_weightings_by_definition():
    table = random_table()
    hard = select(table, selector="ier", budget=0.2)
    view = normalized_view(table)
    kept = hard.kept
    expected = {
        "hard": torch.ones(len(table), dtype=torch.float64),
        "score": view.normalized(table.extra["ier"]),
        "teachability": view.d * view.c,
        "0.1 + 0.9*entropy": 0.1 + 0.9 * view.h,
        "iw": resolve_selector("iw").scores(view),
    }
    num_kept = int(kept.sum())
    expected["rank"] = (num_kept - hard.order).double() / num_kept
    for weighting, weights in expected.items():
        ours = select(table, selector="ier", budget=0.2, weighting=weighting)
        assert torch.equal(ours.kept, kept), weighting
        torch.testing.assert_close(ours.weights, torch.where(kept, weights, 0.0), msg=weighting)


def test_the_score_of_an_ascending_selector_weighs_the_lowest_most():
    table = random_table(masked=0.0)
    ours = select(table, selector="bottom", budget=0.5, weighting="score", normalization="minmax")
    assert ours.weights[ours.order == 0].item() == ours.weights.max().item()


def test_bad_weightings_are_named():
    table = random_table()
    with pytest.raises(ConfigError, match=r"weighting='scores'.*Did you mean"):
        select(table, weighting="scores")
    bare = replace(table, extra={})
    for text in ("sure", "0.1 + 0.9 * bellman"):  # not: declare needs where it is registered
        with pytest.raises(ConfigError, match=r"reads the signal 'student_logprobs'.*pass needs"):
            select(bare, weighting=text)
    with pytest.raises(ConfigError, match="more than a score"):
        select(table, weighting="q3")
    with pytest.raises(NumericsError, match="weight of row"):
        select(table, weighting="teachability - 2")


# scope


@given(tables(min_valid=1), st.sampled_from(["teachability", "random", "bottom", "q3"]), budgets)
@settings(deadline=None)
def test_the_response_scope_is_a_selection_in_every_response(table, name, budget):
    ours = select(table, selector=name, budget=budget, scope="response")
    for completion in set(table.completion.tolist()):
        mine = (table.completion == completion) & (ours.order >= 0)
        num_valid = int(((table.completion == completion) & table.valid).sum())
        if budget == 1.0:
            assert int((ours.kept & (table.completion == completion)).sum()) == num_valid
            continue
        quota = max(1, math.ceil(budget * num_valid)) if num_valid else 0
        best = sorted(ours.order[mine].tolist())[:quota]
        assert sorted(ours.order[mine & ours.kept].tolist()) == best


def test_one_response_has_one_scope():
    table = random_table(50, 1)
    for budget in (0.03, 0.5):
        one, two = (select(table, budget=budget, scope=s) for s in ("global", "response"))
        assert torch.equal(one.kept, two.kept) and one.num_budget == two.num_budget


# schedules


def test_schedules_at_their_ends_and_middle():
    options = {"start": 0.5, "end": 0.1, "num_steps": 101}
    assert scheduled_budget(0, schedule="linear", **options) == 0.5
    assert scheduled_budget(100, schedule="linear", **options) == pytest.approx(0.1)
    assert scheduled_budget(25, schedule="linear", **options) == pytest.approx(0.4)
    assert scheduled_budget(25, schedule="cosine", **options) == pytest.approx(
        0.5 - 0.4 * (1 - math.sqrt(0.5)) / 2
    )
    assert scheduled_budget(50, schedule="cosine", **options) == pytest.approx(0.3)
    assert scheduled_budget(1000, schedule="cosine", **options) == pytest.approx(0.1)
    assert scheduled_budget(9, start=0.2, end=None, schedule="constant", num_steps=0) == 0.2
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        scheduled_budget(0, schedule="cosin", **options)


# draws


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 8.0]), min_size=1, max_size=30),
    st.floats(0.0, 1.0),
    st.data(),
)
@settings(deadline=None)
def test_probabilities_sum_to_the_budget_and_follow_the_scores(values, floor, data):
    scores = torch.tensor(values, dtype=torch.float64)
    num_kept = data.draw(st.integers(1, len(values)))
    pi = inclusion_probabilities(
        scores, torch.ones(len(values), dtype=torch.bool), num_kept=num_kept, floor=floor
    )
    assert pi.sum().item() == pytest.approx(num_kept)
    assert ((pi >= 0) & (pi <= 1)).all()
    assert (pi >= floor * num_kept / len(values) - 1e-12).all()
    order = scores.argsort()
    assert (pi[order].diff() >= -1e-12).all()
    free = pi < 1
    if floor == 0 and scores[free].sum() > 0:  # in proportion, as far as nothing is capped
        torch.testing.assert_close(pi[free] / pi[free].sum(), scores[free] / scores[free].sum())
    generator = torch.Generator().manual_seed(0)
    assert int(draw_rows(pi, num_kept, generator).sum()) == num_kept


def test_rows_are_drawn_with_their_probability():
    scores = torch.tensor([0.0, 0.2, 0.4, 0.4, 1.0, 3.0, 9.0], dtype=torch.float64)
    pi = inclusion_probabilities(scores, torch.ones(7, dtype=torch.bool), num_kept=3, floor=0.2)
    generator = torch.Generator().manual_seed(1)
    times = torch.zeros(7, dtype=torch.float64)
    for _ in range(4000):
        times += draw_rows(pi, 3, generator)
    spread = (4000 * pi * (1 - pi)).sqrt() + 1e-9
    assert ((times - 4000 * pi).abs() / spread).max() < 5


def test_the_drawn_loss_is_the_full_loss_in_expectation():
    """Denominator "completion": unbiased; no clip binds at the default floor and clip."""
    table = random_table(120, 4)
    losses = torch.rand(120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = losses[table.valid].mean().item()
    estimates = []
    for step in range(2000):
        drawn = select(table, selector="ier", budget=0.1, draw="proportional", step=step)
        assert int(drawn.kept.sum()) == drawn.num_budget and drawn.probability is not None
        weights = reduction_weights(
            drawn.weights, table.completion, table.valid, denominator="completion"
        )
        estimates.append(float((weights * losses).sum()))
    mean = sum(estimates) / len(estimates)
    error = torch.tensor(estimates).std().item() / math.sqrt(len(estimates))
    assert abs(mean - truth) < 4 * error
    again = select(table, selector="ier", budget=0.1, draw="proportional", step=1999)
    assert torch.equal(again.kept, drawn.kept)


def test_the_clip_bounds_the_weights():
    table = random_table(120, 4)
    options = {"selector": "ier", "budget": 0.1, "draw": "proportional", "draw_floor": 0.01}
    free = max(select(table, draw_clip=100.0, step=s, **options).weights.max() for s in range(50))
    clipped = max(select(table, draw_clip=1.5, step=s, **options).weights.max() for s in range(50))
    num_valid = int(table.valid.sum())
    assert free > clipped
    assert clipped.item() == pytest.approx(1.5 * num_valid / math.ceil(0.1 * num_valid))


@pytest.mark.parametrize(
    "setting",
    [
        {"scope": "batch"},
        {"draw": "best"},
        {"draw_floor": 1.5},
        {"draw_clip": 0.5},
        {"draw": "proportional", "min_keep": 1},
        {"draw": "proportional", "scope": "response"},
        {"selector": "split", "draw": "proportional"},
        {"selector": "split", "scope": "response"},
    ],
)
def test_settings_that_have_no_meaning_are_refused(setting):
    with pytest.raises(ConfigError, match=next(name for name in setting if name != "selector")):
        select(random_table(), **setting)


def test_scopes_and_draws_of_an_empty_table():
    for setting in ({"scope": "response"}, {"draw": "proportional"}):
        assert not select(table_of([]), **setting).kept.any()


@pytest.mark.parametrize("normalization", ["none", "minmax"])
@pytest.mark.parametrize("lowest", [-50.0, -1.0, 0.0])
def test_negative_scores_weigh_and_draw_in_their_order(normalization, lowest):
    """With `none` all of them had weight 0, so that nothing trained, and were drawn evenly."""
    table = random_table()

    def score(view):
        return lowest + view.table.position.double()

    how = {"selector": score, "budget": 0.3, "normalization": normalization}
    weighted = select(table, weighting="score", **how)
    order = weighted.scores[weighted.kept].argsort()
    weights = weighted.weights[weighted.kept][order]
    assert bool((weights.diff() >= 0).all()) and 0 < float(weights.max()) <= 1
    drawn = select(table, draw="proportional", draw_floor=0.1, **how).probability[table.valid]
    order = weighted.scores[table.valid].argsort()
    assert bool((drawn[order].diff() >= -1e-12).all()) and len(drawn.unique()) > 10


def test_the_prefix_weighs_by_its_score_without_normalization():
    kept = select(
        random_table(), selector="prefix", budget=0.3, normalization="none", weighting="score"
    )
    assert float(kept.weights.max()) == 1.0
