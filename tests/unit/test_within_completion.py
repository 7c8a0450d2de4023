"""Extreme tokens and the cut where a margin fades, against loops in plain Python over each completion."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_tables import random_table, table_of

from taopd.selectors import SELECTORS, normalized_view, select
from taopd.selectors.select import seeded_generator


def candidates_of(name, table):
    view = normalized_view(table, generator=seeded_generator(0, 0))
    return (SELECTORS[name].candidates(view) & table.valid).tolist()


def completions(table):
    """Valid rows of every completion in the order of position."""
    for completion in sorted(set(table.completion.tolist())):
        rows = (table.completion == completion) & table.valid
        yield sorted(rows.nonzero()[:, 0].tolist(), key=lambda i: table.position[i].item())


def gaps(table):
    pairs = zip(table.extra["teacher_logprobs"], table.extra["student_logprobs"], strict=True)
    return [float(t - s) for t, s in pairs]


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.9]))
@settings(deadline=None, max_examples=25)
def test_extremes_of_every_completion(seed, masked):
    table = random_table(60, 6, seed=seed, masked=masked)
    for name in ("teacher_logprobs", "student_logprobs"):
        table.extra[name] = table.extra[name].round(decimals=1)  # so that ties are common
    gap, one, two = gaps(table), set(), set()
    for rows in completions(table):
        if rows:
            one.add(max(rows, key=lambda i: (abs(gap[i]), -table.position[i])))
            two.add(max(rows, key=lambda i: (gap[i], -table.position[i])))
            two.add(max(rows, key=lambda i: (-gap[i], -table.position[i])))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    for name, expected in (("extreme", one), ("extremes", two)):
        found = candidates_of(name, table)
        assert {i for i, here in enumerate(found) if here} == expected
        # The rows of a table come in any order.
        assert candidates_of(name, shuffled(table, order)) == [found[i] for i in order.tolist()]


def shuffled(table, order):
    names = ("disagreement", "compatibility", "entropy", "completion", "position", "valid")
    columns = {name: getattr(table, name)[order] for name in names}
    return replace(table, extra={k: v[order] for k, v in table.extra.items()}, **columns)


def test_at_most_one_or_two_tokens_a_completion_train_and_the_largest_gaps_first():
    table = random_table(200, 10, masked=0.1)
    gap = [abs(each) for each in gaps(table)]
    for name, most in (("extreme", 10), ("extremes", 20)):
        kept = select(table, selector=name, budget=0.5).kept
        assert most / 2 <= int(kept.sum()) <= most and int(kept.sum()) == sum(
            candidates_of(name, table)
        )
    few = select(table, selector="extreme", budget=0.02)
    rest = [i for i, here in enumerate(candidates_of("extreme", table)) if here and not few.kept[i]]
    assert few.num_kept == few.num_budget < 10
    assert min(gap[i] for i in few.kept.nonzero()[:, 0].tolist()) >= max(gap[i] for i in rest)


def cut_by_definition(x):
    """The best place by the Bayesian information criterion of Gaussians; len(x) for none."""

    def squares(part):
        return sum((value - sum(part) / len(part)) ** 2 for value in part)

    def bic(total, parameters):
        # -2 ln L of a Gaussian at its best variance, less what both models share.
        return len(x) * math.log(max(total, 1e-12) / len(x)) + parameters * math.log(len(x))

    best, cut = bic(squares(x), 1), len(x)
    for k in range(1, len(x)):
        early, late = x[:k], x[k:]
        if sum(late) / len(late) >= sum(early) / len(early):
            continue
        found = bic(squares(early) + squares(late), 3)
        if found < best - 1e-9:
            best, cut = found, k
    return cut


@pytest.mark.parametrize(
    ("drop", "seed"), [*((0.0, seed) for seed in range(5)), (0.3, 3), (0.8, 3)]
)
def test_a_completion_is_cut_where_its_margin_fades_and_nowhere_else(drop, seed):
    table = random_table(400, 10, seed=seed, masked=0.2)
    later = table.position >= 3 * table.completion
    table.extra["teacher_margin"] = 0.2 * table.extra["teacher_margin"] + drop * (~later).double()
    found, cuts = candidates_of("fade", table), []
    for rows in completions(table):
        x = table.extra["teacher_margin"][rows].tolist()
        cut = cut_by_definition(x)
        assert [found[i] for i in rows] == [place < cut for place in range(len(rows))]
        cuts.append(cut < len(rows))
    if drop == 0.8:
        # In completion 0 nothing comes before the drop; in 1 to 9 some does.
        assert sum(cuts[1:]) == 9
    # Noise alone is cut in one completion of twenty.
    assert drop > 0 or sum(cuts) <= 4


def test_a_margin_that_rises_or_stays_cuts_nothing():
    rows = [
        (1.0, 0.5, 0.5, completion, place, True) for completion in (0, 1) for place in range(20)
    ]
    table = table_of(rows)
    table.extra["teacher_margin"] = torch.cat(
        [torch.full((20,), 0.4), torch.linspace(0, 1, 20)]
    ).double()
    assert all(candidates_of("fade", table))
    table.extra["teacher_margin"] = table.extra["teacher_margin"].flip(0)
    assert not all(candidates_of("fade", table)[:20]) and all(candidates_of("fade", table)[20:])


def test_fade_keeps_the_teachable_tokens_before_the_cut():
    table = random_table(400, 10, seed=3, masked=0.2)
    table.extra["teacher_margin"] = (table.position < 15).double()
    kept = select(table, selector="fade", budget=0.1)
    plain = select(table, budget=1.0)
    assert (table.position[kept.kept] < 15).all() and kept.num_kept == kept.num_budget
    order = plain.learnable.masked_fill(~table.valid | (table.position >= 15), -1.0)
    assert plain.learnable[kept.kept].min() >= order[~kept.kept].max()
