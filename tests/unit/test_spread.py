"""Selections on tables that stay in parts. Oracle: the same selection on the whole table, row for row."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.distributed.collectives import order_statistics, uniform_part
from taopd.distributed.radix import BYTES_PER_PLACE
from taopd.errors import ConfigError
from taopd.selectors import SELECTORS, select
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.metrics import selection_metrics
from taopd.trainer.selection import check_size, choose, gather_options
from tests.unit.selector_tables import random_table, tables
from tests.unit.simulated_ranks import World, split

LOCAL = sorted(name for name, selector in SELECTORS.items() if selector.local)
EXPRESSIONS = ("0.5*teachability + 0.5*prefix", "bellman(pgt, gamma=0.5)", "max(random, dial)")
numbers = st.one_of(
    st.floats(allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, float("inf")])
)
cuts = st.lists(st.integers(0, 10), min_size=1, max_size=3)


def on_ranks(table, cuts, function):
    """`function` of each part, at once."""
    parts = split(table, cuts)
    return World(len(parts)).run(lambda ranks, part: function(replace(part, ranks=ranks)), parts)


@given(st.lists(st.lists(numbers, max_size=8), min_size=2, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_order_statistics_equal_a_sort(columns, data):
    ascending = torch.tensor([*chain(*columns)], dtype=torch.float64).sort().values
    if len(ascending) == 0:
        return
    places = data.draw(st.lists(st.integers(0, len(ascending) - 1), min_size=1, max_size=4))
    mine = [torch.tensor(column, dtype=torch.float64).sort().values for column in columns]
    world = World(len(columns))
    for found in world.run(lambda ranks, own: order_statistics(own, places, ranks), mine):
        assert found == ascending[places].tolist()
    assert world.num_bytes == BYTES_PER_PLACE * len(places)


def test_order_statistics_of_integers():
    parts = [torch.tensor([-(2**62), 3, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([7])]
    found = World(3).run(lambda ranks, own: order_statistics(own, [0, 1, 2, 3], ranks), parts)
    assert found == [[-(2**62), 3, 7, 7]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_of_one_rank(dtype, monkeypatch):
    monkeypatch.setattr("taopd.distributed.collectives.DRAWS_AT_ONCE", 3)
    whole = torch.Generator().manual_seed(7)
    expected = [torch.rand(40, generator=whole, dtype=dtype) for _ in range(2)]

    def draw(ranks, count):
        generator = torch.Generator().manual_seed(7)
        return [uniform_part(count, generator, ranks, dtype) for _ in range(2)]

    parts = World(4).run(draw, [17, 0, 1, 22])
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected[index])


def compared(whole, parts):
    """Everything a selection says of rows, part by part, and what it says of all of them."""
    for name in ("kept", "scores", "quadrant", "h", "d", "c", "dc", "learnable", "incompatible"):
        found = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(found, getattr(whole, name)), name
    weights = torch.cat([part.weights for part in parts])
    torch.testing.assert_close(weights, whole.weights, rtol=1e-14, atol=0)
    for part in parts:
        for name in ("num_valid", "num_kept", "num_budget", "kept_fraction"):
            assert getattr(part, name) == getattr(whole, name), name
        assert bool((part.order == -1).all())


rules = st.fixed_dictionaries(
    {
        "budget": st.sampled_from([0.01, 0.07, 0.3, 0.55, 0.99, 1.0]),
        "normalization": st.sampled_from(["quantile", "minmax", "none"]),
        "rules": st.sampled_from(["paper", "reference"]),
        "step": st.integers(0, 3),
    },
    optional={
        "min_keep": st.integers(0, 2),
    },
)
scopes = st.sampled_from(
    [
        *({}, {}, {"scope": "response"}, {"scope": "teacher"}),
        *({"weighting": "score"}, {"weighting": "pw"}),
    ]
)


@given(tables(), cuts, st.sampled_from([*LOCAL, *EXPRESSIONS]), rules, scopes)
@settings(max_examples=80, deadline=None)
def test_parts_keep_what_the_whole_keeps(table, cuts, selector, rules, scope):
    if selector == "split" and "scope" in scope:
        scope = {}
    how = {"selector": selector, **rules, **scope}
    table = replace(table, extra=table.extra | {"teacher": (table.completion % 2).double()})
    # What may not train may be anything: NaN there must not matter.
    masked = replace(table, disagreement=table.disagreement.masked_fill(~table.valid, torch.nan))
    table = masked if rules["rules"] == "paper" else table
    compared(select(table, **how), on_ranks(table, cuts, lambda part: select(part, **how)))


@pytest.mark.parametrize("selector", LOCAL)
def test_every_selector_on_many_rows(selector):
    table, how = random_table(2000, 20, seed=5), {"selector": selector, "budget": 0.1}
    compared(select(table, **how), on_ranks(table, [3, 3, 11], lambda part: select(part, **how)))


def test_a_spread_selection_costs_the_same_for_any_number_of_rows():
    costs = []
    for num_rows in (40, 4000):
        table = random_table(num_rows, 4)
        world, parts = World(2), split(table, [2])
        world.run(lambda ranks, part: select(replace(part, ranks=ranks)), parts)
        costs.append(world.num_bytes)
    # Four scales and two medians of two places each, the cut, and the tie.
    assert costs[0] == pytest.approx(costs[1], abs=BYTES_PER_PLACE + 100)
    assert costs[1] < 25 * BYTES_PER_PLACE


def make_args(**values):
    values = {"method": "anchored"} | values  # reach has tests of its own, also over ranks
    return TeachabilityConfig(output_dir="runs/x", bf16=False, use_cpu=True, **values)


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
def test_loss_weights_anchors_and_metrics_equal_the_whole(reduction):
    table = random_table(600, 12, seed=2)
    args = make_args(
        method="anchored",
        reduction=reduction,
        anchor_responses=0.5,
        shadow_selectors=["tip", "random"],
    )
    how = {"step": 0, "training": True}
    whole = choose(table, args, **how)
    assert bool(whole.reference_mask.any())
    expected = selection_metrics(table, whole.selection, whole.budget, whole.shadows)

    def both(part):
        choice = choose(part, args, **how)
        return choice, selection_metrics(part, choice.selection, choice.budget, choice.shadows)

    parts = on_ranks(table, [5, 9], both)
    for name in ("reference_mask", "anchor_weights", "loss_weights"):
        found = torch.cat([getattr(choice, name) for choice, _ in parts])
        torch.testing.assert_close(found, getattr(whole, name), rtol=1e-14, atol=0)
    for name, mask in whole.shadows.items():
        assert torch.equal(torch.cat([choice.shadows[name] for choice, _ in parts]), mask)
    for _, metrics in parts:
        assert metrics == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"selector": "fire"}, "'fire'"),
        ({"selector": "rank(tip)"}, "rank"),
        ({"selector": lambda view: view.d}, "local=True"),
        ({"draw": "proportional"}, "draw='proportional'"),
        ({"weighting": "rank"}, "weighting='rank'"),
        ({"weighting": "iw"}, "weighting='iw'"),
    ],
)
def test_what_needs_the_whole_table_is_refused_on_parts(how, words):
    table = random_table(40, 4)
    select(table, **how)
    with pytest.raises(ConfigError, match=words):
        on_ranks(table, [2], lambda part: select(part, **how))


def test_a_run_that_may_outgrow_the_limit_is_refused_before_it_starts():
    args = make_args(selector="fire", max_completion_length=100, gather_limit=999)
    check_size(args, 10, 1)
    check_size(make_args(max_completion_length=100, gather_limit=999), 10, 2)
    with pytest.raises(ConfigError, match=r"'fire'.*gather_limit"):
        check_size(args, 10, 2)
    shadow = make_args(shadow_selectors=["dash"], max_completion_length=100, gather_limit=999)
    with pytest.raises(ConfigError, match="'dash'"):
        check_size(shadow, 10, 2)


def test_only_declared_columns_travel():
    assert gather_options(make_args())["columns"] == ("teacher",)
    assert gather_options(make_args(selector="dial", weighting="pw"))["columns"] == (
        "student_logprobs",
        "teacher_logprobs",
        "teacher",
    )
    assert gather_options(make_args(selector="fire"))["columns"] is None
