"""The analysis of per-arm results. Oracle: scipy and counting, on results written by hand."""

import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from taopd.cli import main
from taopd.errors import DataError
from taopd.experiments.study.analysis import (
    Question,
    analyse,
    timings,
)
from taopd.experiments.study.finished import analyse_finished, read_outcomes
from taopd.report.figures.study import draw
from taopd.report.folders import read_folders
from taopd.report.study_table import markdown, table
from tests.unit.study_simulation import outcome

FULL, TEACH, RANDOM = [0.90, 0.88, 0.93], [0.93, 0.90, 0.99], [0.60, 0.62, 0.70]


def results_of_arms():
    rows = []
    for name, selector, budget, values in (
        ("full", "full", 1.0, FULL),
        ("teachability@10%", "teachability", 0.1, TEACH),
        ("random@10%", "random", 0.1, RANDOM),
    ):
        rows += [
            outcome(
                name,
                selector,
                budget,
                seed,
                value,
                num_test_prompts=500,
                train_seconds=9.0 + seed,
                train_seconds_curve=[[0, 0.0], [10, 9.0]],
                selected_tokens_curve=[[0, 0], [10, 100]],
                prompt_digests=[[0, "a"], [10, f"seed{seed}"]],
            )
            for seed, value in enumerate(values)
        ]
    return rows


def test_differences_are_paired_and_corrected():
    found = analyse(results_of_arms())
    rows = {(row["arm"], row["to"]): row for row in found["comparisons"]}
    assert set(rows) == {
        ("teachability@10%", "full"),
        ("teachability@10%", "random"),
        ("random@10%", "full"),
    }
    for (name, to), (first, second) in {
        ("teachability@10%", "full"): (TEACH, FULL),
        ("teachability@10%", "random"): (TEACH, RANDOM),
        ("random@10%", "full"): (RANDOM, FULL),
    }.items():
        expected = stats.ttest_rel(first, second)
        interval = expected.confidence_interval(0.95)
        row = rows[name, to]
        assert row["p"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    p = sorted(row["p"] for row in rows.values())
    assert min(row["p_holm"] for row in rows.values()) == pytest.approx(3 * p[0])
    assert found["pairing"]["same_prompts"] is True


def test_order_of_results_does_not_matter_but_of_arms_does():
    rows = results_of_arms()
    shuffled = [*rows[:3][::-1], *rows[3:6][::-1], *rows[6:]]
    assert json.dumps(analyse(rows)) == json.dumps(analyse(shuffled))


def test_no_wall_clock_value_reaches_the_results():
    rows = results_of_arms()
    slower = [row | {"train_seconds": 99.0, "train_seconds_curve": [[0, 1.0]]} for row in rows]
    assert json.dumps(analyse(rows)) == json.dumps(analyse(slower))
    assert timings(slower)[0]["train_seconds"] == 99.0


def test_collapsed_seeds_medians_and_the_floor_in_words():
    rows = results_of_arms()
    rows[3] |= {"accuracy_curve": [[0, 0.4], [5, 0.95], [10, 0.1]], "accuracy_greedy": 0.1}
    found = analyse(rows)
    arm = next(arm for arm in found["arms"] if arm["name"] == "teachability@10%")
    assert (arm["collapsed_seeds"], arm["collapsed_share"]) == ([0], pytest.approx(1 / 3))
    assert arm["greedy"]["median"] == 0.90
    words = found["noise_floor"]["words"]
    assert words.startswith("Differences below ") and "cannot be told apart with 3 seeds" in words
    assert "between arms in which no seed collapsed" in words
    strict = analyse(rows, question=Question(collapse_points=90.0))
    assert all(arm["collapsed_share"] == 0 for arm in strict["arms"])


def test_one_seed_says_that_nothing_can_be_judged():
    found = analyse([row for row in results_of_arms() if row["seed"] == 0])
    assert "run more seeds" in found["noise_floor"]["words"]
    assert all(row["p"] is None for row in found["comparisons"])


def test_a_seed_that_one_arm_lacks_is_left_out_of_its_differences():
    found = analyse([r for r in results_of_arms() if (r["name"], r["seed"]) != ("full", 2)])
    row = next(row for row in found["comparisons"] if row["to"] == "full")
    assert row["seeds"] == [0, 1]


def test_prompts_in_another_order_are_said():
    rows = results_of_arms()
    rows[0]["prompt_digests"] = [[0, "a"], [10, "other"]]
    pairing = analyse(rows)["pairing"]
    assert pairing["same_prompts"] is False and "seeds [0]" in pairing["words"]
    del rows[0]["prompt_digests"]
    assert analyse(rows)["pairing"]["same_prompts"] is None


def test_the_same_arm_and_seed_twice():
    rows = results_of_arms()
    with pytest.raises(DataError, match="two results of arm 'full' with seed 0"):
        analyse([*rows, rows[0]])
    with pytest.raises(DataError, match="no results"):
        analyse([])


def test_reading_folders(tmp_path):
    with pytest.raises(DataError, match="no arm has finished"):
        read_outcomes(tmp_path)
    for row in results_of_arms():
        place = tmp_path / "arms" / f"{row['name']}-seed{row['seed']}"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(row))
    assert len(read_outcomes(tmp_path)) == 9
    by_default = analyse(read_outcomes(tmp_path), question=Question())
    assert analyse_finished(tmp_path)[0]["arms"] == by_default["arms"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="not that of a study"):
        analyse_finished(tmp_path)
    (place / "results.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="it has no selector"):
        read_outcomes(tmp_path)


def test_an_analysis_beside_the_arms_is_no_arm(tmp_path):
    """`taopd compare ARMS` leaves one there."""
    arms = tmp_path / "study" / "arms"
    for row in results_of_arms():
        place = arms / f"{row['name']}-seed{row['seed']}"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(row), encoding="utf-8")
    tables = []
    for folder in (arms, arms, arms.parent):
        assert main(["compare", str(folder)]) == 0
        found = json.loads((folder / "so-far" / "results.json").read_text(encoding="utf-8"))
        tables.append(found["arms"])
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 3
    (study,) = read_folders([arms.parent]).studies
    assert len(study.outcomes) == 9


def test_table_page_and_pictures(tmp_path):
    rows = results_of_arms()
    found = {"title": "a study"} | analyse(rows)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    assert "teachability@10%" in console.export_text()
    page = markdown(found, timings(rows))
    assert "| full |" in page and "cannot be told apart with 3 seeds" in page
    assert "| teachability@10% | 94.0 [83,100] | 93.0 | 0/3 |" in page
    paths = draw(found, tmp_path)
    assert {path.name for path in paths} == {f"accuracy.{kind}" for kind in ("png", "svg")}
    before = [path.read_bytes() for path in paths]
    assert before == [path.read_bytes() for path in draw(found, tmp_path)]


def test_the_report_reads_an_analysed_study(tmp_path):
    """An arm's steps and selected tokens are means over seeds there, and so no whole numbers."""
    rows = [row | {"steps": 4, "selected_tokens": 501 + row["seed"]} for row in results_of_arms()]
    results = {"title": "a study"} | analyse(rows)
    assert isinstance(results["arms"][0]["selected_tokens"], float)
    (tmp_path / "results.json").write_text(json.dumps(results))
    (study,) = read_folders([tmp_path]).studies
    assert len(study.outcomes) == len(rows)


def arm_by_problem(name, selector, budget, digits):
    """An arm whose seeds get right what the digits of each say."""
    return [
        outcome(
            name,
            selector,
            budget,
            seed,
            right.count("1") / len(right),
            num_test_prompts=len(right),
            right_greedy_curve=[[0, "0" * len(right)], [10, right]],
        )
        for seed, right in enumerate(digits)
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_over_problems_is_scipys_paired_one_of_means_over_seeds(seeds):
    generator = np.random.default_rng(seeds)
    digits = {
        name: ["".join(map(str, generator.binomial(1, share, 60))) for _ in range(seeds)]
        for name, share in (("full", 0.6), ("random@10%", 0.3))
    }
    rows = arm_by_problem("full", "full", 1.0, digits["full"])
    rows += arm_by_problem("random@10%", "random", 0.1, digits["random@10%"])
    results = analyse(rows)
    (row,) = results["comparisons"]
    right = {
        name: np.mean([list(map(int, each)) for each in seen], 0) for name, seen in digits.items()
    }
    expected = stats.ttest_rel(right["random@10%"], right["full"]).confidence_interval(0.95)
    assert row["over_problems"] == pytest.approx({"low": expected.low, "high": expected.high})
    # One seed has no interval over seeds: the table shows this one, and says so.
    text = markdown({"title": "t"} | results, [])
    shown = row["over_problems"] if seeds == 1 else row
    low, high = (100 * shown[end] for end in ("low", "high"))
    assert f"{100 * row['difference']:+.1f} [{max(low, -100):.0f},{high:.0f}]" in text
    assert ("over held-out problems" in text) == (seeds == 1)


def test_arms_that_agree_on_every_problem_are_not_certain_to_agree_on_others():
    rows = arm_by_problem("full", "full", 1.0, ["0110"])
    rows += arm_by_problem("random@10%", "random", 0.1, ["0110"])
    (row,) = analyse(rows)["comparisons"]
    assert row["difference"] == 0 and row["over_problems"]["low"] < 0 < row["over_problems"]["high"]


@pytest.mark.parametrize("other", ["011", None], ids=["another number of problems", "not recorded"])
def test_problems_that_cannot_be_paired_give_no_interval(other):
    rows = arm_by_problem("full", "full", 1.0, ["0110"])
    rows += arm_by_problem("random@10%", "random", 0.1, [other or "0110"])
    if other is None:
        del rows[-1]["right_greedy_curve"]
    (row,) = analyse(rows)["comparisons"]
    assert row["over_problems"] is None
    assert "over held-out problems alone" not in analyse(rows)["noise_floor"]["words"]


def test_a_study_whose_arms_have_few_seeds_in_common_says_what_each_interval_is_over():
    rows = arm_by_problem("full", "full", 1.0, ["0110", "0111"])
    rows += arm_by_problem("teachability@10%", "teachability", 0.1, ["1110", "0110"])
    rows += arm_by_problem("random@10%", "random", 0.1, ["0100"])  # its second seed still runs
    results = analyse(rows)
    text = markdown({"title": "t"} | results, [])
    assert (
        "over seeds, of differences paired within seeds; of one common seed over held-out" in text
    )
    assert "held-out problems alone" not in results["noise_floor"]["words"]
