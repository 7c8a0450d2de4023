"""What a page says of its numbers is so: captions, settings, ticks, lines and bars on odd data.

Oracles: the data that were written; the pixels in the picture.
"""

import json
import re
from itertools import pairwise

import pandas as pd
import pytest

from taopd.experiments.study.analysis import analyse
from taopd.report.charts import Series, decimals, lines, number
from taopd.report.figures import rates, study
from taopd.report.folders import Run, Study
from taopd.report.page import write_report
from taopd.report.row_charts import bars
from taopd.report.sections import accuracy, runs, selected
from tests.unit.study_simulation import outcome


def study_of(*arms):
    """A study of (name, selector, budget, accuracies by seed)."""
    rows = [
        outcome(name, selector, budget, seed, value, num_test_prompts=200)
        for name, selector, budget, values in arms
        for seed, value in enumerate(values)
    ]
    return Study(name="s", path=None, results={"title": "s"} | analyse(rows))


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ((3, 3), "95 % t interval of the mean over 3 training seeds, 200 held-out prompts"),
        ((3, 2), "95 % t interval of the mean over 2 to 3 training seeds, 200 held-out prompts"),
        (
            (3, 1),
            "95 % t interval of the mean over 3 training seeds, 200 held-out prompts; of an arm with one "
            "seed 95 % Wilson interval over 200 held-out prompts",
        ),
        ((1, 1), "95 % Wilson interval over 200 held-out prompts, one training seed"),
    ],
)
def test_a_caption_names_the_interval_of_every_arm(seeds, words):
    """Arms of a study that is not finished have different numbers of seeds."""
    arms = [("full", "full", 1.0, [0.8, 0.7, 0.75][: seeds[0]])]
    arms += [("t", "teachability", 0.1, [0.6, 0.7, 0.5][: seeds[1]])]
    assert accuracy.interval_words(study_of(*arms)) == words


def test_an_accuracy_that_has_no_interval_is_said_to_have_none():
    rows = [outcome("t", "teachability", 0.1, 0, 0.5)]
    found = Study(name="s", path=None, results={"outcomes": rows})
    assert accuracy.interval_words(found) == "no interval, one training seed"


MINUS = "\N{MINUS SIGN}"
LONG = "/data/" + "x" * 90


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        ([f"{LONG}A", f"{LONG}B"], [f"…{'x' * 20}A", f"…{'x' * 20}B"]),
        ([f"{LONG}A", f"{LONG}B", None], [f"…{'x' * 20}A", f"…{'x' * 20}B", "\N{EN DASH}"]),
        ([1e-4, 1.0000001e-4], ["0.0001", "0.00010000001"]),
        ([0.1, 0.2], ["0.1", "0.2"]),
    ],
)
def test_settings_that_differ_where_they_are_cut_are_not_the_same_in_all(values, cells):
    made = [
        Run(name=f"r{i}", path=None, config={"teacher": value, "budget": 0.1})
        for i, value in enumerate(values)
    ]
    made = [Run(name=r.name, path=None, config=r.config, changed=r.config) for r in made]
    page = runs._settings(made)
    differing, same = page.split("<summary>")
    assert re.findall(r"<td>([^<]*)</td>", differing) == ["teacher", *cells]
    assert "Same in all (1)" in same and "budget" in same and "teacher" not in same


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999.4, "999"),
        (999.7, "1,000"),
        (-999.7, f"{MINUS}1,000"),
        (-12.34, f"{MINUS}12.3"),
        (1e9, "1e+09"),
    ],
)
def test_a_number_that_rounds_to_a_thousand_has_no_exponent(value, text):
    assert number(value) == text


def ticks_of(chart):
    return re.findall(r'text-anchor="end">([^<]*)</text>', chart)[:-1]


@pytest.mark.parametrize("top", [1e-14, 3e-10, 1e-7, 4.2e-7, 5e-6, 3e-4, 0.02, 0.3, 7.0, 2e5])
def test_ticks_of_an_axis_differ(top):
    chart = lines("t", [Series(label="a", points=[(1, top / 4), (2, top)])])
    shown = ticks_of(chart)
    assert len(shown) > 2 and len(set(shown)) == len(shown)
    values = [float(text.replace(",", "")) for text in shown]
    steps = [b - a for a, b in pairwise(values)]
    assert min(steps) == pytest.approx(max(steps), rel=1e-6)
    assert decimals([0.0, 0.5, 1.0]) == 1


def test_a_level_line_within_the_axis_is_drawn():
    """The page of budgets says that a level line is full distillation, however low the arms are."""
    low = [Series(label="t", points=[(5, 10.0), (10, 30.0)])]
    chart = lines("t", low, to=75.0, limit=70.0)
    (y,) = re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="limit"', chart)
    assert 16 <= float(y) < 30
    assert 'class="limit"' not in lines("t", low, limit=70.0)  # a limit of a guard, far away


def test_a_negative_bar_goes_to_the_left():
    chart = bars("gain", [("lost", -1.0, f"{MINUS}1"), ("won", 1.0, "+1"), ("none", 0.0, "0")])
    places = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart)
    (lost, size), (won, other), (none, _) = [(float(x), float(w)) for x, w in places]
    assert lost + size == pytest.approx(won) and won == none and size == other > 10


def test_arms_without_greedy_accuracy_make_a_page(tmp_path):
    arms = [{"name": "a", "sampled": {"mean": 0.5, "low": 0.4, "high": 0.6}}]
    rows = [
        {"name": "a", "seed": 0, "accuracy_curve": [[0, 0.2], [9, 0.5]], "accuracy_sampled": 0.5}
    ]
    (tmp_path / "results.json").write_text(json.dumps({"arms": arms, "outcomes": rows}))
    report = write_report([tmp_path], tmp_path / "page.html")
    assert "50.0" in report.path.read_text()


def test_arms_of_several_number_formats_are_noted():
    formats = {"full": "bfloat16", "t": "float32"}
    rows = [outcome(name, "full", 1.0, 0, 0.5, dtype=kind) for name, kind in formats.items()]
    notes = {arm["name"]: arm.get("note") for arm in analyse(rows)["arms"]}
    assert notes == {
        name: f"it computed in {kind}, as not all arms did" for name, kind in formats.items()
    }
    rows = [outcome(name, "full", 1.0, 0, 0.5, dtype="float32") for name in formats]
    rows += [outcome("older", "full", 1.0, 0, 0.5)]
    assert not any("note" in arm for arm in analyse(rows)["arms"])


def test_pictures_of_odd_names_and_many_arms(tmp_path, monkeypatch):
    """Arms of others: what matplotlib would take for a formula, or for no label; more than fit."""
    names = ["_hidden", "$cost_1", "a$b$c^", "x" * 80]
    many = names + [f"arm{i}" for i in range(20)]
    found = study_of(*((name, "teachability", 0.1, [0.5]) for name in many))
    drawn = {}
    monkeypatch.setattr(study, "save", lambda figure, *_: drawn.update(figure=figure) or [])
    monkeypatch.setattr(study, "_MOST_PANELS", 8)
    study.draw(found.results, tmp_path)
    drawn["figure"].canvas.draw()
    assert sum(axes.get_visible() for axes in drawn["figure"].axes) == 8
    assert "the first 8 of 24 arms" in drawn["figure"].get_suptitle()
    # As many as there may be fit into a picture's 65,536 pixels.
    monkeypatch.undo()
    assert (2.3 * study._MOST_PANELS / study._COLUMNS + 0.7) * 150 < 2**16

    arms = [
        {"name": name, "curve": [[1e-4, 0.5]], "best_rate": 1e-4, "best": 0.5} for name in names
    ]
    monkeypatch.setattr(rates, "save", lambda figure, *_: drawn.update(figure=figure) or [])
    rates.draw(found.results | {"rates": {"arms": arms, "rates": [1e-4]}}, tmp_path)
    drawn["figure"].canvas.draw()
    legend = drawn["figure"].axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == names


def test_a_token_stands_among_those_kept_most_or_least_and_not_in_both():
    tokens = pd.DataFrame({"token_id": [0, 1, 2] * 10, "kept": [1, 0, 0] * 5 + [1, 1, 0] * 5})
    tables = selected._most_and_least(tokens, {0: "a", 1: "b", 2: "c"}).split("</figure>")
    assert [re.findall("<td>(.)</td>", each) for each in tables[:2]] == [["a", "b"], ["c"]]
