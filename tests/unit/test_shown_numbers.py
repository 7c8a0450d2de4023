"""Numbers on the page, in tables and pictures. Oracles: counted by hand from what a run wrote."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from selector_tables import random_table

from taopd.cli import plan
from taopd.diagnose.verdicts import _verdict
from taopd.preflight import rollout_checks
from taopd.report import study_table, terminal
from taopd.report.figures import diagnose
from taopd.report.folders import Run, read_folders
from taopd.report.generated_part import markdown_table
from taopd.report.pack import pack
from taopd.report.rollouts import Rollout, read_rollouts
from taopd.report.sections import (
    budget_and_cost,
    headline,
    learnable,
    selected,
    tables,
    training,
    warnings,
)
from taopd.runs.limits import situation_words
from taopd.runs.shares import per_cent
from taopd.selectors import select
from taopd.signals import TEACHER
from taopd.trainer.metrics import METRICS, selection_metrics, teacher_metrics
from taopd.trainer.rollout_log import _cut
from tests.browser import synthetic


@pytest.mark.parametrize(
    ("share", "digits", "shown"),
    [
        *((0.0, 1, "0.0"), (1.0, 1, "100.0"), (0.5, 0, "50"), (0.123, 1, "12.3")),
        *((0.004, 0, "0.4"), (0.0004, 1, "0.04"), (1e-6, 1, "<0.001")),
        *(
            (0.996, 0, "99.6"),
            (0.9996, 1, "99.96"),
            (1 - 1e-6, 0, ">99.99"),
            (sum([0.1] * 10), 1, "100.0"),
        ),
    ],
)
def test_a_share_reads_0_or_100_only_where_it_is(share, digits, shown):
    assert per_cent(share, digits) == tables.percent(share, digits) == shown


def test_a_situation_is_not_rounded_to_nothing_or_to_all():
    words = situation_words(0.996, 0.004, 0.0, method="reach")
    assert (
        "99.6% is teachable" in words and "0.4% is within reach" in words and " 0% is out" in words
    )


# -- what is logged -------------------------------------------------------------------------------


def test_a_mean_over_nothing_is_no_number():
    """A batch that is skipped has no token; a 0 would enter the mean of the steps of a log."""
    table = random_table(masked=0.0)
    table = replace(table, extra=table.extra | {TEACHER: torch.zeros(len(table)).double()})
    names = "teachability", "other"
    whole, empty = (
        selection_metrics(each, found := select(each, budget=0.1), 0.1, {"tip": found.kept})
        | teacher_metrics(each, found, names)
        for each in (table, replace(table, valid=torch.zeros_like(table.valid)))
    )
    counts = {name for name in whole if name.startswith(("teacher/comp", "teacher/valid"))}
    counts -= {name for name in counts if name.startswith("teacher/compat")}
    counts |= {"select/nominal_fraction", "select/kept_tokens", "select/valid_tokens"}
    assert set(empty) == counts and set(whole) > counts
    assert all(empty[name] == 0.0 for name in counts - {"select/nominal_fraction"})
    assert "select/kept_disagreement_nats" in METRICS and "select/mean_weight" in whole


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, True),
        ({"selector": "q3", "min_keep": 1}, True),
        ({"selector": "full"}, True),
        ({"draw": "proportional"}, False),
        ({"scope": "response"}, False),
        ({"scope": "teacher"}, False),
    ],
)
def test_a_cut_is_written_where_the_first_places_are_the_kept_ones(settings, known):
    table = random_table(num_rows=400, masked=0.0)
    by_row = (torch.arange(400) % 4 == 0).double()
    table = replace(table, extra=table.extra | {TEACHER: by_row})
    found = select(table, budget=0.1, **settings)
    scored = SimpleNamespace(choice=SimpleNamespace(selection=found), table=table)
    cut = _cut(scored)
    assert (cut is not None) == known
    if known and found.kept_fraction < 1:
        assert (
            found.kept[(found.order >= 0) & (found.order < cut)].all() and cut == found.num_budget
        )


# -- the page -------------------------------------------------------------------------------------


def run_of(metrics=(), path=None, **config):
    return Run(name="a", path=path, config=config, metrics=list(metrics))


def test_what_was_selected_counts_the_tokens_that_may_train_and_all_classes(tmp_path, monkeypatch):
    """Four files, two of which are read: 6 tokens each, of which one may not train and two are kept."""
    (tmp_path / "selection").mkdir()
    for step in range(1, 5):
        pd.DataFrame(
            {
                "position": range(6),
                "token_id": [0, 1, 2, 3, 4, 5],
                "kept": [True, False, False, True, False, False],
                "quadrant": [1, 2, 3, 4, 1, 0],
            }
        ).to_parquet(tmp_path / f"selection/step-{step:06d}.parquet")
    monkeypatch.setattr(selected, "MAX_FILES", 2)
    line = {"token_ids": [0, 1], "tokens": ["7", "8"]}
    seen = Rollout(run="a", step=1, line=line, pieces=["7", "8"], correct=None, kind="words")
    page = selected.body([run_of(path=tmp_path)], [seen])
    assert "a: 40.0 % of 10 tokens kept" in page
    assert "every logged token of 2 of 4 generation batches" in page
    assert "The text of 6 tokens is in no rollout of this page" in page
    classes = page.split("By token class")[1].split("</figure>")[0]
    words = re.findall(r"(number|not known)<.*?>([\d.]+) % · ([\d.]+) % of kept", classes)
    assert words == [("not known", "33.3", "50"), ("number", "50.0", "50")]


def chart_notes(page):
    """By title the words beside it."""
    found = re.findall(r"<figcaption>([^<]*?)(?: <small>(.*?)</small>)?</figcaption>", page)
    return dict(found)


@pytest.mark.parametrize(
    ("config", "loss", "c", "h"),
    [
        (
            {"method": "reach", "compatibility": "reach"},
            "with the held tokens",
            "could have",
            "nats",
        ),
        (
            {"method": "published", "compatibility": "mass"},
            "mean of the kept",
            "top tokens",
            "nats",
        ),
        (
            {"denominator": "completion", "signals": "topk_lists", "compatibility": "bc"},
            "over all tokens",
            "compatibility by bc",
            "0 to 1",
        ),
    ],
)
def test_a_chart_says_what_its_metric_is_in_this_run(config, loss, c, h):
    names = [name for _, name, _ in training.CHARTS]
    page = training.body(
        [run_of([{"step": s} | dict.fromkeys(names, 0.5) for s in (1, 2)], **config)]
    )
    notes = chart_notes(page)
    assert loss in notes["Distillation loss"] and notes["Distillation loss"].startswith("nats; ")
    for title in ("Compatibility C, mean", "C of the kept tokens"):
        assert c in notes[title]
    assert notes["Student&#x27;s entropy H, mean"] == h


@pytest.mark.parametrize(("signals", "unit"), [("exact", "nats"), ("topk_lists", "0 to 1")])
def test_the_inspectors_say_in_what_unit_the_entropy_is(tmp_path, capsys, signals, unit):
    line = synthetic.rollout(np.random.default_rng(0), 6, step=1)
    folder = synthetic.write_run(tmp_path / "a", [line])
    config = json.loads((folder / "config.json").read_text()) | {"signals": signals}
    (folder / "config.json").write_text(json.dumps(config))
    rollouts = read_rollouts(read_folders([folder]).runs, limit=1)
    assert pack(rollouts)[0]["signals"]["entropy"]["unit"] == unit
    terminal.show(rollouts, rollouts, signal="entropy")
    assert f"entropy ({unit}):" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "results", "words"),
    [
        (9, {}, ["4 of 9 steps are done; there are no results yet"]),
        (-1, {}, ["4 steps are done; there are no results yet"]),
        *((steps, {"steps": 4}, []) for steps in (9, 4, -1)),
    ],
)
def test_a_run_that_has_not_ended_is_told_by_steps_and_by_epochs(steps, results, words):
    run = run_of([{"step": step} for step in (2, 4)], max_steps=steps)
    assert warnings._unfinished(replace(run, results=results)) == words


def test_steps_without_an_update_are_told():
    """Logged every fifth step: two of the steps 6 to 10, one of 11 to 12. Oracle: counted."""
    shares = {5: 0.0, 10: 0.4, 12: 0.5}
    run = run_of([{"step": step, "numerics/skipped": share} for step, share in shares.items()])
    (told,) = warnings._skipped(run)
    assert told.startswith("3 steps made no update") and told.endswith("the first by step 10")
    assert warnings._skipped(run_of([{"step": 5, "numerics/skipped": 0.0}])) == []
    assert warnings._skipped(run_of([{"step": 5}])) == []


def test_the_verdict_on_a_run_names_the_distillation_loss():
    run = run_of([{"step": s, "loss/selected_nats": 1.0 / s} for s in (1, 4)])
    words = headline._of_runs([run])
    assert words.startswith("After 4 steps the distillation loss is 0.25 nats, from 1.")


def test_several_steps_on_a_batch_are_timed_as_one_step():
    """Sampling takes 3 s and a step 1 s more: with two steps on a batch a step takes 2.5 s, sampling 1.5."""
    lines = [
        {"step": s, "step_time": 4.0, "perf/sample_s": 3.0}
        if s % 2
        else {"step": s, "step_time": 1.0}
        for s in range(1, 9)
    ]
    run = run_of(lines, num_iterations=2)
    assert training._of_steps(run, "step_time") == [2.5] * 4
    assert training._of_steps(run, "perf/sample_s") == [1.5] * 4
    longer = [{"step": s, "step_time": 2.5, "perf/sample_s": 3.0} for s in (4, 8)]
    assert training._of_steps(run_of(longer, num_iterations=2), "perf/sample_s") == [1.5] * 2
    assert training._of_steps(run_of(lines), "step_time") == [4.0, 1.0] * 4


def test_a_sum_over_steps_counts_the_steps_between_two_logs():
    run = run_of([{"step": 5, "step_time": 2.0}, {"step": 7, "step_time": 1.0}])
    assert budget_and_cost._summed(run, "step_time") == {0: 0.0, 5: 10.0, 7: 12.0}
    assert budget_and_cost._summed(run, "perf/cpu_s") == budget_and_cost._summed(None, "x") == {}


@pytest.mark.parametrize(
    ("gain", "bar", "cell"),
    [
        *((0.25, "+0.250", "+0.2500"), (0.00041, "+0.00041", "+0.0004")),
        *((-3e-6, "-3e-06", "-3e-06"), (0.0, "+0.000", "+0.0000")),
    ],
)
def test_a_small_gain_is_not_shown_as_none(tmp_path, gain, bar, cell):
    """One step at a usual learning rate moves a model by a few millionths of a nat."""
    manifest = {"checkpoints": [{"label": "model", "gain_forward_nats/mean": gain}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert f">{bar} nats<" in learnable._gains(tmp_path)
    row = {"selector": "tip", "optimizer": "adamw", "variant": "raw", "mean": gain, "low": 0.0}
    table = pd.DataFrame([row | {"measure": "gain_forward_fresh", "high": 0.0}])
    table.to_parquet(tmp_path / "summary.parquet")
    assert f">{cell}<" in learnable._one_step(tmp_path).replace("\N{MINUS SIGN}", "-")
    found = {"value": gain, "low": gain, "high": gain, "note": ""}
    told = _verdict("x", "y", found, 5, "gain_forward").sentence
    assert f"{cell} nats [{cell}, {cell}]" in told


def test_a_plan_of_a_small_model_is_not_all_zeros():
    sizes = [0.0312, 1.26, 12.4, 1234.5]
    assert [plan._short(size) for size in sizes] == ["0.031", "1.3", "12", "1,234"]
    counts = [134_500, 134_500_000, 1_720_000_000]
    assert list(map(plan._parameters, counts)) == ["0.13 M", "0.13 B", "1.72 B"]


@pytest.mark.parametrize(("tokens", "shown"), [(0.0, "0.0"), (0.031, "0.03"), (4.26, "4.3")])
def test_a_few_tokens_of_a_check_are_not_none(tokens, shown):
    assert rollout_checks._few(tokens) == shown


# -- tables and pictures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "words"), [([3, 3], "3 seeds"), ([1, 3], "1 to 3 seeds"), ([1], "1 seed")]
)
def test_a_study_says_how_many_seeds_its_arms_have(counts, words):
    arms = [{"name": str(index), "num_seeds": count} for index, count in enumerate(counts)]
    assert study_table.seeds_words({"seeds": list(range(max(counts))), "arms": arms}) == words


@pytest.mark.parametrize(
    ("low", "high", "brackets", "half"),
    [
        (0.41, 0.62, " [41,62]", "+-11"),
        (0.498, 0.502, " [49.8,50.2]", "+-0.2"),
        (-0.003, 0.004, " [-0.3,0.4]", "+-0.4"),
        (0.003, 0.05, " [0.3,5.0]", "+-2"),
        (0.0, 0.12, " [0,12]", "+-6"),
        (1.0, 1.0, " [100,100]", "+-0"),
        (None, None, "", ""),
    ],
)
def test_an_interval_keeps_its_width_and_its_side_of_0(low, high, brackets, half):
    middle = 0.0 if low is None else (low + high) / 2
    assert study_table._brackets(low, middle, high) == brackets
    assert study_table._plus_minus(low, middle, high) == half


def test_a_name_cannot_move_the_numbers_of_a_table():
    lines = markdown_table(("arm", "a"), [["x|y", "1"], ["x\\|y\nz", "2"]])
    assert lines[2:] == ["| x\\|y | 1 |", "| x\\|y z | 2 |"]


@pytest.mark.parametrize("known", [True, False])
def test_a_bar_without_an_interval_has_no_error_bar(tmp_path, monkeypatch, known):
    rows = [
        {"selector": name, "budget": 0.1, "value": value, "num_tied": 0}
        | ({"low": value - 0.1, "high": value + 0.1} if known else {"low": np.nan, "high": np.nan})
        for name, value in (("tip", 0.4), ("random", 0.1))
    ]
    table = pd.DataFrame(rows).assign(
        num_kept=[3, 5],
        num_requested=5,
        gain="gain_forward",
        unit="nats",
        n=50,
        num_clusters=1,
        n_excluded=0,
    )
    drawn = {}
    monkeypatch.setattr(diagnose, "save", lambda figure, *_: drawn.update(figure=figure) or [])
    diagnose.draw_matched(table, tmp_path)
    (axes,) = drawn["figure"].axes
    caps = [line for line in axes.lines if line.get_marker() == "|"]
    marks = sum(np.isfinite(np.asarray(line.get_xdata(), float)).sum() for line in caps)
    assert marks == (4 if known else 0)
    # The mean of a selector with too few candidates is over fewer tokens.
    assert [text.get_text() for text in axes.texts] == [" 3"]
    plt.close(drawn["figure"])


def test_a_picture_says_what_it_leaves_out(tmp_path, monkeypatch):
    drawn, tokens = {}, pd.DataFrame({"gain_forward": np.linspace(-1, 1, 40)})
    tokens["disagreement_k16"], tokens["compatibility_k16"] = np.linspace(0, 2, 40), 0.5
    monkeypatch.setattr(diagnose, "save", lambda figure, *_: drawn.update(figure=figure) or [])
    diagnose.draw_gain_against_disagreement(tokens, tmp_path)
    title = drawn["figure"].axes[0].get_title(loc="left")
    assert "D below 0.02, drawn at the edge" in title and "fewer than 3 tokens left out" in title
    plt.close(drawn["figure"])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_rounds_alike(tmp_path):
    source = resources.files("taopd.report") / "assets" / "data.js"
    shares, script = [0.004, 0.05, 0.9996, 1.0, 0.0, 1e-6, 1 - 1e-6], tmp_path / "x.cjs"
    script.write_text(
        f"const T = {{}};\n{source.read_text()}\n"
        f"console.log(JSON.stringify([...{shares}.map((share) => T.share(share, 0)), "
        "...[0.996, 0.2, 0.0004].map(T.percent)]))"
    )
    done = subprocess.run(["node", script], capture_output=True, text=True, check=True)
    likely = [">99 %", "20 %", "<0.1 %"]
    assert json.loads(done.stdout) == [f"{per_cent(s, 0)} %" for s in shares] + likely
