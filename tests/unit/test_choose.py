"""`choose` and the settings it reads: schedules, shadows, stop tokens, signals that a source lacks."""

import itertools
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from selector_tables import budgets, random_table, tables

from taopd.errors import ConfigError
from taopd.models.stop_tokens import stop_ids
from taopd.selectors import SELECTORS, register_selector, select
from taopd.signals import lists_from_exact, signals_from_logprobs
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.metrics import jaccard, selection_metrics
from taopd.trainer.selection import (
    choose,
    local_table,
    scales_compatibility,
    signal_needs,
    signal_options,
)
from taopd.trainer.watches.spread_watch import SpreadWatch
from tests.conftest import is_documented


def config(**settings):
    """Anchored unless a test says otherwise: method reach has tests of its own."""
    settings = {"method": "anchored"} | settings
    return TeachabilityConfig(output_dir="x", bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_the_selectors_that_scale_c_are_known(selector):
    """Oracle: whether other values of C, D and H as they are, make another selection."""
    table = random_table(masked=0.0)
    table = replace(table, extra=table.extra | {"mass": torch.rand(len(table)).double()})
    other = replace(table, compatibility=table.compatibility.flip(0) ** 3)
    kept = [select(each, selector=selector, budget=0.1).kept for each in (table, other)]
    # The one that reads C, but not its scale.
    reads = not torch.equal(*kept) and selector != "teachability_raw_c"
    assert scales_compatibility(config(selector=selector)) == reads
    assert not scales_compatibility(config(selector=selector, normalization="none"))


@pytest.mark.parametrize("selector", ["teachability*entropy", "rank_or(tip, compatible)"])
def test_expressions_that_scale_c_are_known(selector):
    assert scales_compatibility(config(selector=selector))
    assert not scales_compatibility(config(selector="rank_or(tip, entropy)"))


def test_a_c_that_hardly_varies_drops_large_disagreements_unless_it_is_taken_as_it_is():
    """53 of 1,000 tokens at D = 5 nats, a third of them with a C that is lower by 1e-4."""
    table = random_table(num_rows=1000, masked=0.0)
    largest = torch.arange(1000) < 53
    disagreement = torch.where(largest, 5.0, table.disagreement / 10)
    lower = largest & (torch.arange(1000) % 3 == 0)
    close = 1.0 - 1e-6 * table.compatibility - torch.where(lower, 1e-4, 0.0)
    table = replace(table, disagreement=disagreement, compatibility=close)
    dropped = {
        name: int((largest & ~select(table, budget=0.053, normalization=name).kept).sum())
        for name in ("quantile", "none")
    }
    assert dropped["quantile"] >= int(lower.sum()) == 18
    assert dropped["none"] == 0


def test_the_log_warns_once_of_a_c_that_hardly_varies(caplog):
    logging.getLogger("taopd").propagate = True
    quantiles = {"signal/compatibility/p10": 0.99995, "signal/compatibility/p90": 1.0}
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    for settings, logs, said in (
        ({}, quantiles, 1),
        ({"selector": "entropy"}, quantiles, 0),
        ({"normalization": "none"}, quantiles, 0),
        ({}, quantiles | {"signal/compatibility/p10": 0.9}, 0),
        ({}, {"eval_loss": 1.0}, 0),
    ):
        caplog.clear()
        watch = SpreadWatch(config(**settings))
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                watch.on_log(None, state, None, logs=logs)
        assert len(caplog.records) == said
        assert all("normalization: none" in record.getMessage() for record in caplog.records)


def logprob_signals(**options):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 12, 9, generator=generator, dtype=torch.float64)
    return signals_from_logprobs(*logits.log_softmax(-1), torch.arange(12) % 9, k=3, **options)


def test_choose_hands_every_setting_to_the_selection():
    table = random_table()
    args = config(
        selector="rank_or(tip, ier)",
        budget=0.2,
        draw="proportional",
        draw_floor=0.3,
        draw_clip=2.0,
        weighting="entropy",
        denominator="completion",
        seed=5,
    )
    found = choose(table, args, step=3, training=True)
    expected = select(
        table,
        selector="rank_or(tip, ier)",
        budget=0.2,
        draw="proportional",
        draw_floor=0.3,
        draw_clip=2.0,
        weighting="entropy",
        seed=5,
        step=3,
    )
    assert torch.equal(found.selection.kept, expected.kept)
    assert torch.equal(found.loss_weights, expected.weights / table.valid.sum())
    scoped = choose(table, config(budget_scope="response"), step=0, training=True)
    assert torch.equal(scoped.selection.kept, select(table, scope="response").kept)


def test_the_budget_follows_its_schedule_and_evaluation_keeps_everything():
    table = random_table(masked=0.0)
    args = config(budget=0.5, budget_end=0.1, budget_schedule="linear", max_steps=5)
    kept = [int(choose(table, args, step=s, training=True).selection.kept.sum()) for s in range(5)]
    assert kept == [100, 80, 60, 40, 20]
    longer = config(budget=0.5, budget_end=0.1, budget_schedule="linear", budget_steps=9)
    assert choose(table, longer, step=4, training=True).budget == pytest.approx(0.3)
    evaluation = choose(table, args, step=4, training=False)
    assert evaluation.selection.kept.all() and evaluation.budget == 1.0 and not evaluation.shadows


def test_shadows_are_the_masks_of_plain_selections_at_the_same_budget():
    table = random_table()
    names = ["random", "entropy", "rank_and(tip, ier)", "teachability"]
    plain = choose(table, config(budget=0.1), step=2, training=True)
    choice = choose(table, config(budget=0.1, shadow_selectors=names), step=2, training=True)
    assert torch.equal(choice.loss_weights, plain.loss_weights)  # looking changes nothing
    masks = {
        name: set(
            select(table, selector=name, budget=0.1, step=2, seed=42).kept.nonzero()[:, 0].tolist()
        )
        for name in names
    }
    active = masks["teachability"]
    metrics = selection_metrics(table, choice.selection, choice.budget, choice.shadows)
    assert all(is_documented(name) for name in metrics)
    for name in names:
        expected = len(active & masks[name]) / len(active | masks[name])
        assert metrics[f"shadow/jaccard/{name}"] == pytest.approx(expected)
    for one, two in itertools.combinations(names, 2):
        expected = len(masks[one] & masks[two]) / len(masks[one] | masks[two])
        assert metrics[f"shadow/jaccard_between/{one} & {two}"] == pytest.approx(expected)
    assert metrics["shadow/jaccard/teachability"] == 1.0
    assert jaccard(torch.zeros(3).bool(), torch.zeros(3).bool()) == 1.0


def test_only_the_signals_that_someone_reads_are_asked_for():
    assert signal_needs(config()).signals == ()
    args = config(selector="dial", weighting="pgt", shadow_selectors=["ier", "reverse_kl"])
    assert set(signal_needs(args).signals) == {
        *("student_logprobs", "teacher_logprobs", "log_ratio_variance", "ier", "reverse_kl")
    }
    assert signal_options(args)["full_kl"] and not signal_options(config())["full_kl"]
    table = local_table(
        logprob_signals(full_kl=True), args, torch.zeros(12).long(), torch.arange(12)
    )
    assert set(signal_needs(args).signals) <= set(table.extra)


@pytest.mark.parametrize(
    "settings",
    [{"selector": "pgt"}, {"weighting": "ier"}, {"shadow_selectors": ["tip*reverse_kl"]}],
)
def test_lists_refuse_at_once_what_they_cannot_give(settings):
    with pytest.raises(ConfigError, match=r"signals='topk_lists' cannot give.*choose among .*dial"):
        config(signals="topk_lists", **settings)
    config(**settings)


def test_what_lists_can_give_they_give():
    args = config(
        signals="topk_lists", selector="dial", shadow_selectors=["corrective", "selectkd"]
    )
    signals = lists_from_exact(logprob_signals())
    table = local_table(signals, args, torch.zeros(12).long(), torch.arange(12))
    assert choose(table, args, step=0, training=True).selection.kept.any()


class Named:
    def __init__(self, ids):
        self.eos_token_id = ids
        self.generation_config = self


def of(args):
    return args.stop_tokens, args.stop_token_ids


def test_stop_tokens_are_excluded_or_merged():
    assert stop_ids(*of(config()), Named(2), Named([3])) == ()
    args = config(stop_tokens="exclude")
    ids = stop_ids(*of(args), Named(2), Named([5, 2]), Named(None))
    assert ids == (2, 5)
    table = local_table(logprob_signals(), args, torch.zeros(12).long(), torch.arange(12), ids)
    assert table.valid.tolist() == [token % 9 not in ids for token in range(12)]
    merge = config(stop_tokens="merge")
    assert signal_options(merge, ids)["stop_ids"] == (2, 5)
    assert stop_ids(*of(config(stop_tokens="merge", stop_token_ids=[7, 4])), Named(2)) == (4, 7)
    with pytest.raises(ConfigError, match="one id only, 2"):
        stop_ids(*of(merge), Named(2), Named([2]))
    with pytest.raises(ConfigError, match="set stop_token_ids"):
        stop_ids(*of(args), Named(None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"budget_schedule": "linear"}, "needs budget_end too"),
        ({"budget_end": 0.1}, "set budget_schedule='linear' or 'cosine' too"),
        ({"budget_schedule": "linear", "budget_end": 0.1}, "needs max_steps"),
        ({"budget_schedule": "linear", "budget_end": 1.1, "max_steps": 3}, "budget_end"),
        ({"budget_scope": "row"}, "budget_scope"),
        ({"weighting": "scor"}, "weighting='scor'"),
        ({"draw": "soft"}, "draw='soft'"),
        ({"draw_floor": 2.0}, "draw_floor"),
        ({"draw_clip": 0.0}, "draw_clip"),
        ({"stop_tokens": "drop"}, "stop_tokens"),
        ({"stop_token_ids": [1]}, "no effect"),
        ({"shadow_selectors": ["entropie"]}, "Did you mean 'entropy'"),
        ({"match_update_norm": 0.0}, "match_update_norm"),
        ({"selector": "tip*entropie"}, "Did you mean 'entropy'"),
        ({"draw": "proportional", "min_keep": 1}, "min_keep=0"),
        ({"budget_scope": "response", "selector": "split"}, "split"),
    ],
)
def test_bad_settings_fail_when_the_config_is_made(settings, says):
    with pytest.raises(ConfigError, match=says):
        config(**settings)


@pytest.mark.parametrize("setting", ["selector", "weighting", "shadow_selectors"])
def test_a_signal_that_nothing_gives_is_refused_when_the_config_is_made(setting):
    register_selector("mine", needs=("teacher_entropi",))(lambda view: view.d)
    try:
        with pytest.raises(ConfigError, match=r"'mine' needs .* Did you mean 'teacher_entropy'"):
            config(**{setting: ["mine"] if setting == "shadow_selectors" else "mine"})
    finally:
        SELECTORS.pop("mine")


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    tables(min_valid=1), budgets, st.sampled_from(["teachability", "entropy", "divergence"])
)
def test_a_share_for_each_teacher(table, budget, selector):
    """Oracle: the order of the selection without a scope, cut for each teacher by itself."""
    teacher = table.completion % 3
    table = replace(table, extra=table.extra | {"teacher": teacher.double()})
    kept = select(table, selector=selector, budget=budget, scope="teacher").kept
    order = select(table, selector=selector, budget=min(budget, 0.99)).order
    for one in range(3):
        own = (teacher == one) & table.valid
        number = math.ceil(budget * int(own.sum()))
        best = sorted((int(order[row]), row) for row in own.nonzero()[:, 0].tolist())[:number]
        assert sorted(row for _, row in best) == (kept & own).nonzero()[:, 0].tolist()


def test_factors_on_rows_leave_denominator_and_other_rows():
    """Oracle: the weights without factors, row by row."""
    table = random_table()
    teacher = (table.completion % 2).double()
    table = replace(table, extra=table.extra | {"teacher": teacher})
    for changed in ({}, {"reduction": "sample_mean"}, {"denominator": "completion"}):
        how = {"step": 0, "training": True}
        plain = choose(table, config(**changed), **how)
        scaled = choose(table, config(**changed), **how, teacher_weights=(1.0, 0.25))
        expected = plain.loss_weights * torch.where(teacher == 1, 0.25, 1.0)
        torch.testing.assert_close(scaled.loss_weights, expected)
        assert torch.equal(scaled.anchor_weights, plain.anchor_weights)


def test_a_table_without_a_column_that_is_read_is_refused_by_the_name_of_the_column():
    """As the table of somebody's own engine, with the default settings."""
    how = {"step": 0, "training": True}
    column = torch.zeros(len(table := random_table())).double()
    full = {"reach": column, "initial_logprobs": column}
    for name in (*full, "student_logprobs", "teacher_logprobs"):
        held = {key: value for key, value in (table.extra | full).items() if key != name}
        with pytest.raises(ConfigError, match=f"method: reach reads the signal '{name}', which"):
            choose(replace(table, extra=held), config(method=None), **how)
    choose(replace(table, extra=table.extra | full), config(method=None), **how)
    with pytest.raises(ConfigError, match="teacher_weights reads the column 'teacher', which"):
        choose(table, config(), **how, teacher_weights=(1.0, 0.25))


def test_a_share_for_each_teacher_needs_teachers():
    table = random_table()
    with pytest.raises(ConfigError, match="scope='teacher' reads the column 'teacher'"):
        select(table, scope="teacher")
