"""Folders that meet on one page: runs, evaluations, one-step tables; one color and one name per arm.

Oracles: differences counted by hand, the colors and words as they stand in the page.
"""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from taopd.errors import DataError
from taopd.report.arms import named
from taopd.report.charts import Series, lines
from taopd.report.evaluations import differences, read_evaluation, unlike
from taopd.report.folders import read_folders
from taopd.report.page import write_report
from taopd.report.rollouts import bare
from tests.browser import synthetic

CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def evaluation(folder: Path, model: str, right: list[bool], *, first: int = 0) -> Path:
    """What `taopd evaluate --greedy` writes, as far as a report reads it."""
    folder.mkdir(parents=True)
    rate = sum(right) / len(right)
    results = {
        "model": model,
        "dataset": "x.parquet",
        "pass_at_k": {"1": rate},
        "intervals": {"1": [max(0.0, rate - 0.1), min(1.0, rate + 0.1)]},
        "num_problems": len(right),
        "num_samples": 1,
        "settings": {"do_sample": False},
    }
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        {"prompt": f"{first + number} =", "answer": str(first + number), "correct": correct}
        for number, correct in enumerate(right)
    ]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(folders, tmp_path) -> str:
    write_report(folders, tmp_path / "x.html", match="exact")
    return (tmp_path / "x.html").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("meet")
    lines = [synthetic.rollout(np.random.default_rng(s), 20, step=s) for s in range(3)]
    return [
        synthetic.write_run(root / "ours", lines),
        synthetic.write_run(root / "plain", lines, selector="random"),
    ]


def test_a_run_its_evaluation_and_a_second_run_meet(runs, tmp_path):
    ours = [True] * 30 + [False] * 10
    theirs = [True] * 20 + [False] * 20
    first = evaluation(tmp_path / "e1", str(runs[0] / "model"), ours)
    second = evaluation(tmp_path / "e2", str(runs[1] / "checkpoint-5"), theirs)
    page = page_of([*runs, first, second], tmp_path)
    outcome = page[page.index('<section id="outcome"') :]
    # 30 of 40 against 20 of 40, all differences 0 or 1: mean 1/4, and its error by hand.
    deviation = (10 * 0.75**2 + 30 * 0.25**2) / 39
    half = 2.0227 * (deviation / 40) ** 0.5
    low, high = f"+{100 * (0.25 - half):.1f}", f"+{100 * (0.25 + half):.1f}"
    row = re.search(r"<tr><td>ours \(e1\)</td><td>plain.*?</tr>", outcome)[0]
    assert all(text in row for text in ("+25.0", f"{low} to {high}", ">40<", "higher"))
    assert "plain (checkpoint-5 e2)" in row
    verdict = re.search(r'<p class="verdict">(.*?)</p>', page)[1]
    assert verdict.startswith("ours (e1) answers 75.0 % of 40 problems right, 25.0 points above")


def test_only_the_same_problems_are_compared(tmp_path):
    paths = [
        evaluation(tmp_path / "a", "m", [True, False, True]),
        evaluation(tmp_path / "b", "n", [False, True, True], first=2),
        evaluation(tmp_path / "c", "o", [False, False, True]),
    ]
    found = differences([read_evaluation(path) for path in paths])
    # a and b share one problem only, b and c likewise.
    assert [(d.one.name, d.other.name, d.estimate.n) for d in found] == [("a", "c", 3)]
    assert found[0].estimate.mean == pytest.approx(1 / 3)


def test_an_evaluation_whose_transcripts_were_cut_is_compared_with_none(tmp_path):
    paths = [evaluation(tmp_path / name, name, [True, False] * 4) for name in "ab"]
    whole, cut = [read_evaluation(path) for path in paths]
    assert unlike(whole, cut) == ""
    lines = (paths[1] / "transcripts.jsonl").read_text().splitlines(keepends=True)
    (paths[1] / "transcripts.jsonl").write_text("".join(lines[:5]))
    cut = read_evaluation(paths[1])
    assert unlike(whole, cut) == "b/transcripts.jsonl lacks 3 completions: it was cut"
    assert differences([whole, cut]) == []


def test_a_damaged_evaluation_is_named(tmp_path):
    folder = evaluation(tmp_path / "a", "m", [True, False])
    (folder / "results.json").write_text('{"model": "m", "pass_at_k": {"1": 7}}')
    with pytest.raises(DataError, match=r"results\.json, pass_at_k"):
        write_report([folder], tmp_path / "x.html")


@pytest.mark.parametrize("names", [{"full"}, {"teachability@5%"}, None])
def test_no_key_of_an_outcome_must_be_there(tmp_path, names):
    """A study of another writer: the page of arms that lack one key, `full` alone too."""
    study = synthetic.write_study(tmp_path / "study")
    whole = (study / "results.json").read_text()
    for key in set(json.loads(whole)["arms"][0]) - {"accuracy_curve"}:
        document = json.loads(whole)
        for arm in document["arms"]:
            if names is None or arm["name"] in names:
                del arm[key]
        (study / "results.json").write_text(json.dumps(document))
        assert "Outcome" in page_of([study], tmp_path)


def test_a_one_step_folder_is_a_table(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": "taopd-one-step-1"}')
    rows = [
        (selector, "adamw", variant, f"gain_forward_{group}", value, 0.0, 1.0, 2)
        for variant, factor in (("raw", 2.0), ("equal_norm", 1.0))
        for selector, value in (("teachability", 0.25 * factor), ("random", 0.125 * factor))
        for group in ("selected", "others", "fresh")
    ]
    names = ["selector", "optimizer", "variant", "measure", "mean", "low", "high", "num_batches"]
    pd.DataFrame(rows, columns=names).to_parquet(folder / "summary.parquet")
    page = page_of([folder], tmp_path)
    assert re.search(r"<td>teachability</td>(<td class=\"n\">\+0\.2500</td>){3}", page)


def test_an_arm_has_one_color_and_a_short_name_everywhere(tmp_path):
    """In the intervals, the curves, the key and the bars."""
    study = synthetic.write_study(tmp_path / "study")
    document = json.loads((study / "results.json").read_text())
    document["arms"] = [arm for arm in document["arms"] if arm["seed"] == 0]
    document["arms"][1]["name"], document["arms"][1]["selector"] = "random", "random"
    (study / "results.json").write_text(json.dumps(document))
    lines = [synthetic.rollout(np.random.default_rng(1), 20, step=1)]
    for name in ("teachability@10%", "random", "full"):  # another order than the study's
        selector = name.partition("@")[0]
        synthetic.write_run(study / "arms" / f"{name}-seed0", lines, selector=selector)
    page = page_of([study], tmp_path)
    assert "study/" not in page and "-seed0<" not in page
    dots = re.findall(r'class="ink">([\w@%]+)<title>.*?class="f(\d)"', page)
    colors = dict(dots)
    assert colors["random"] == "3" and len(set(colors.values())) == 3
    keys = re.findall(r'class="line k(\d)"/></svg>([\w@%]+)</li>', page)
    lines_of = re.findall(r'class="line k(\d)[^"]*"><title>([\w@%]+)</title>', page)
    assert len(keys) >= 3 and len(lines_of) >= 6
    assert {(name, color) for color, name in keys + lines_of} == set(colors.items())


def test_a_selectors_line_by_budget_has_the_color_of_its_first_arm(tmp_path):
    page = page_of([synthetic.write_study(tmp_path / "study")], tmp_path)
    dots = dict(re.findall(r'class="ink">([\w@%]+)<title>.*?class="f(\d)"', page))
    assert dots["full"] == "0" and dots["teachability@5%"] == "1"
    assert set(re.findall(r'class="line k(\d)[^"]*"><title>teachability<', page)) == {"1"}
    assert re.findall(r'class="line k(\d)"/></svg>teachability</li>', page) == ["1"]


def test_models_of_nobody_have_no_arms_color(runs, tmp_path):
    """Two runs, two evaluations of other models: four colors."""
    folders = [evaluation(tmp_path / name, f"/else/{name}", [True, False]) for name in ("a", "b")]
    found = named(read_folders([*runs, *folders]))
    colors = [each.color for each in (*found.runs, *found.evaluations)]
    assert len(set(colors)) == 4
    alone = named(read_folders(folders))
    assert [each.color for each in alone.evaluations] == [0, 1]


def test_two_studies_of_one_name_can_be_told_apart(tmp_path):
    """In the names of their runs and in the headings of every section."""
    lines = [synthetic.rollout(np.random.default_rng(1), 20, step=1)]
    studies = [synthetic.write_study(tmp_path / where / "study") for where in "ab"]
    for study in studies:
        synthetic.write_run(study / "arms" / "full-seed0", lines)
        document = json.loads((study / "results.json").read_text())
        for arm in document["arms"]:
            arm["train_seconds_curve"] = [[0, 0.0], [10, 1.0], [20, 2.0]]
        (study / "results.json").write_text(json.dumps(document))
    found = read_folders(studies)
    assert [study.name for study in found.studies] == ["study", "study (2)"]
    assert [run.name for run in found.runs] == ["study/full-seed0", "study (2)/full-seed0"]
    page = page_of(studies, tmp_path)
    assert re.findall(r"<h3>([^<]*: synthetic)</h3>", page) == 2 * [
        "study: synthetic",
        "study (2): synthetic",
    ]


def test_labels_at_the_ends_carry_names_and_do_not_touch():
    series = [Series(label=f"arm {i}", points=[(0, 0.0), (9, 90.0 + i)]) for i in (2, 3, 0, 1)]
    chart = lines("x", series, to=100.0, names=True, size=(540, 250))
    found = re.findall(r'y="([\d.]+)" class="ink">arm \d ([\d.]+)<', chart)
    heights = sorted(float(y) for y, _ in found)
    assert sorted(value for _, value in found) == ["90", "91", "92", "93"]
    assert min(b - a for a, b in pairwise(heights)) >= 15
    drawn = re.findall(r"<polyline[^>]*><title>(arm \d)</title>", chart)
    assert drawn == ["arm 0", "arm 1", "arm 2", "arm 3"]  # the best one on top


@pytest.mark.parametrize(
    ("values", "begins"),
    [
        ((0.97, 0.99), 0.97),
        ((0.2, 0.9), 0.0),
        ((0.9, 0.9), 0.0),
        # 10.3 stood at five ticks, 0.942721 likewise: the second pair differs by rounding alone.
        ((10.290, 10.332), 10.29),
        ((0.9427205, 0.9427211), 0.0),
    ],
)
def test_the_axis_fits_values_that_hardly_differ(values, begins):
    chart = lines("C", [Series(label="a", points=list(enumerate(values)))])
    ticks = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)</text>', chart)]
    assert min(ticks) == pytest.approx(begins, abs=0.01)
    assert len(set(ticks)) == len(ticks)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (
            [
                f"{CHATML}{q}<|im_end|>\n<|im_start|>assistant\n"
                for q in ("Ben has 6", "Ben has 7", "Al")
            ],
            0,
        ),
        ([f"[INST] {q} [/INST]" for q in ("one", "two", "three")], None),
        (["1 + 1 =", "1 + 2 =", "2 + 2 ="], None),
        (["same\nx", "same\nx", "same\nx"], None),
    ],
    ids=["chatml", "no line or token ends it", "plain", "one prompt"],
)
def test_template_words_are_taken_off_and_no_word_of_a_prompt(prompts, expected):
    found, before, after = bare(prompts)
    assert [before + text + after for text in found] == prompts
    if expected is None:
        assert found == prompts
    else:
        assert found == ["Ben has 6", "Ben has 7", "Al"]


def test_a_study_of_one_seed_shows_the_interval_over_its_prompts(tmp_path):
    """Oracle: Wilson's formula, written out."""
    from taopd.report.folders import Study
    from taopd.report.sections.accuracy import estimates_of

    share, n, z = 0.39, 100, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    outcome = {"name": "full", "seed": 0, "accuracy_greedy": share, "num_test_prompts": n}
    curve = {"accuracy_curve": [[0, 0.04], [24, share]]}
    # As `taopd compare` writes it: one seed has no interval over seeds.
    arm = {"name": "full", "greedy": {"mean": share, "low": None, "high": None}}
    results = {"arms": [arm], "outcomes": [outcome | curve]}
    found = estimates_of(Study(name="x", path=tmp_path, results=results))["full"]["greedy"]
    assert found == pytest.approx((share, middle - half, middle + half), abs=1e-4)
