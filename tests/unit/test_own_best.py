"""Arms at several learning rates. Oracles: loops over scipy's paired test, counting, and simulation."""

import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from taopd.errors import ConfigError, DataError
from taopd.experiments.study.analysis import (
    Question,
    analyse,
    timings,
)
from taopd.experiments.study.best_of import between_best, spread
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import load_study_file, parse_study_file
from taopd.experiments.study.finished import analyse_finished
from taopd.experiments.study.run import base_config
from taopd.report.figures.rates import draw
from taopd.report.page import write_report
from taopd.report.rates_table import table
from taopd.report.study_table import markdown
from tests.unit.study_simulation import outcome, over_problems, over_seeds, own_best_coverage

RATES = (1e-5, 1e-4)
GOOD = {"lab": "dialect", "grid": {"selector": ["tip"], "budget": [0.1]}, "seeds": [0, 1]}
RIGHT = {
    ("full", 1e-5): ("11100000", "11000000", "11110000"),
    ("full", 1e-4): ("11111100", "11111000", "11111010"),
    ("tip", 1e-5): ("11111110", "11111000", "11111100"),
    ("tip", 1e-4): ("10000000", "11000000", "00000000"),
    ("random", 1e-5): ("10000000", "11000000", "10000000"),
    ("random", 1e-4): ("11000000", "11000000", "11100000"),
}


def results_of_arms():
    rows = []
    for (name, rate), answers in RIGHT.items():
        for seed, digits in enumerate(answers):
            more = {"right_greedy_curve": [[0, "1" * 8], [10, digits]], "learning_rate": rate}
            budget = 1.0 if name == "full" else 0.1
            accuracy = digits.count("1") / 8
            made = outcome(f"{name},lr={rate:g}", name, budget, seed, accuracy, **more)
            rows.append(made | {"num_test_prompts": 8, "train_seconds": 1.0})
    return rows


def analysed(**question):
    question = Question(**{"rates": RATES, **question})
    return {"title": "a study"} | analyse(results_of_arms(), question=question)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 4)])
def test_bounds_are_the_extremes_of_all_paired_tests(shape):
    """Low: over the arm's rates the best of the worst; each test at the level of its side."""
    generator = np.random.default_rng(sum(shape))
    first, second = (generator.normal(0.5, 0.1, (count, 6)) for count in shape)
    found = between_best(first, second)
    lows, highs = np.empty(shape), np.empty(shape)
    for r, q in np.ndindex(shape):
        test = stats.ttest_rel(first[r], second[q])
        lows[r, q] = test.confidence_interval(1 - 0.05 / shape[0]).low
        highs[r, q] = test.confidence_interval(1 - 0.05 / shape[1]).high
    assert found.low == pytest.approx(max(min(row) for row in lows))
    assert found.high == pytest.approx(min(max(column) for column in highs.T))
    if found.p < 1:
        edge = between_best(first, second, level=1 - found.p)
        assert min(abs(edge.low), abs(edge.high)) < 1e-9
    swapped = between_best(second, first)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_one_unit_has_no_bounds_and_equal_units_no_certainty():
    one = between_best(np.array([[0.5], [0.4]]), np.array([[0.3]]))
    assert (one.low, one.high, one.p) == (None, None, None)
    same = between_best(np.full((2, 3), 0.5), np.full((1, 3), 0.4), least=0.01)
    assert same.low < 0.1 < same.high and 0 < same.p < 1
    assert spread(np.array([[0.5], [0.4]]))[1:] == (None, None)


@pytest.mark.parametrize(("draw_arms", "units"), [(over_seeds, 10), (over_problems, 300)])
def test_own_best_covers_no_difference_where_the_plain_interval_does_not(draw_arms, units):
    """One arm is equally good at five rates, the other at one: the first gains by the choice alone."""
    corrected, naive = own_best_coverage(draw_arms, (5, 1), units)
    assert corrected >= 0.95 and naive < 0.92


@pytest.mark.parametrize("equal", [(5, 5), (1, 1)])
def test_own_best_covers_with_three_seeds(equal):
    assert own_best_coverage(over_seeds, equal, 3, studies=500)[0] >= 0.95


def test_spread_of_equal_rates_is_not_told_from_0():
    generator = np.random.default_rng(0)
    found = [spread(over_seeds(generator, (5, 5), 5, 5)[0]) for _ in range(300)]
    assert all(size > 0 for size, _, _ in found)
    assert np.mean([low == 0 for _, low, _ in found]) >= 0.95
    for r, good in enumerate((0.9, 0.7, 0.5)):
        values = np.full((3, 4), 0.5) + generator.normal(0, 0.001, (3, 4))
        values[r] = good
        size, low, high = spread(values)
        truth = good - 0.5
        assert low - 0.01 <= truth <= high + 0.01 and size == pytest.approx(truth, abs=0.01)


def test_every_arm_is_compared_at_its_own_best_and_at_the_shared_rate():
    found = analysed()["rates"]
    assert (found["shared_rate"], found["shared_by"]) == (1e-4, "best of full")
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert {name: arm["best_rate"] for name, arm in arms.items()} == {
        **{"full": 1e-4, "tip": 1e-5, "random": 1e-4}
    }
    count = {key: sum(d.count("1") for d in answers) / 24 for key, answers in RIGHT.items()}
    spread_of_tip = 100 * (count["tip", 1e-5] - count["tip", 1e-4])
    assert arms["tip"]["spread"]["points"] == pytest.approx(spread_of_tip)
    assert arms["tip"]["curve"] == [[rate, pytest.approx(count["tip", rate])] for rate in RATES]
    rows = {(row["arm"], row["to"]): row for row in found["comparisons"]}
    assert set(rows) == {("tip", "full"), ("tip", "random"), ("random", "full")}
    own, shared = (rows["tip", "full"][basis] for basis in ("own_best", "shared"))
    assert own["rates"] == [1e-5, 1e-4] and shared["rates"] == [1e-4, 1e-4]
    assert own["difference"] == pytest.approx(count["tip", 1e-5] - count["full", 1e-4])
    assert shared["difference"] == pytest.approx(count["tip", 1e-4] - count["full", 1e-4])
    # At a shared rate nothing is chosen: scipy's paired test, over problems and over seeds.
    for unit, axis in (("over_problems", 0), ("over_seeds", 1)):
        right = [
            np.array([[int(d) for d in digits] for digits in RIGHT[name, 1e-4]]).mean(axis)
            for name in ("tip", "full")
        ]
        test = stats.ttest_rel(*right)
        assert shared[unit]["low"] == pytest.approx(max(-1, test.confidence_interval().low))
        assert shared[unit]["p"] == pytest.approx(test.pvalue)
        assert own[unit]["p_holm"] >= own[unit]["p"]
    named = analysed(shared_rate=1e-5)["rates"]
    assert (named["shared_rate"], named["shared_by"]) == (1e-5, "config")
    assert "rates" not in analyse(results_of_arms())


def test_intervals_at_the_own_best_rate_end_where_accuracies_do():
    """Of three seeds or eight problems an interval is wider than what an accuracy, or a spread, can be."""
    found = analysed()["rates"]
    own = [arm[unit] for arm in found["arms"] for unit in ("over_seeds", "over_problems")]
    assert all(0 <= each["low"] <= each["high"] <= 1 for each in own)
    assert min(each["low"] for each in own) == 0 and max(each["high"] for each in own) == 1
    tip = next(arm for arm in found["arms"] if arm["name"] == "tip")
    assert tip["spread"]["over_seeds"] == {"low": 0.0, "high": 100.0}
    rows = [arm for arm in results_of_arms() if arm["seed"] < 2]
    compared = analyse(rows, question=Question(rates=RATES))["rates"]["comparisons"]
    seeds = [row["own_best"]["over_seeds"] for row in compared]
    assert min(each["low"] for each in seeds) == -1 and max(each["high"] for each in seeds) == 1


def test_rates_without_answers_by_problem_or_with_broken_ones():
    rows = results_of_arms()
    for row in rows:
        del row["right_greedy_curve"]
    row = analyse(rows, question=Question(rates=RATES))["rates"]["comparisons"][0]
    assert row["own_best"]["over_problems"] is None and row["own_best"]["over_seeds"]["low"] < 0
    rows = results_of_arms()
    rows[3]["right_greedy_curve"] = [[10, "1102"]]
    with pytest.raises(DataError, match=r"full,lr=0.0001, seed 0: .* a digit, 0 or 1"):
        analyse(rows, question=Question(rates=RATES))
    rows[3]["right_greedy_curve"] = [[10, "110"]]
    row = analyse(rows, question=Question(rates=RATES))["rates"]["comparisons"][0]
    assert row["own_best"]["over_problems"] is None


def test_rates_that_no_arm_bears():
    with pytest.raises(DataError, match="no arm has a name that ends with one of the rates"):
        analyse(results_of_arms(), question=Question(rates=(3e-7,)))


def test_an_unfinished_study_is_compared_on_what_is_there():
    """One rate of one arm is missing, and one seed of another."""
    rows = [r for r in results_of_arms() if r["name"] != "tip,lr=0.0001"]
    rows = [r for r in rows if (r["name"], r["seed"]) != ("full,lr=1e-05", 2)]
    found = {"title": "so far"} | analyse(rows, question=Question(rates=RATES))
    row = next(r for r in found["rates"]["comparisons"] if (r["arm"], r["to"]) == ("tip", "full"))
    assert row["seeds"] == [0, 1] and row["shared"] is None
    assert "| tip | 1e-05 |" in markdown(found, [])


def test_table_markdown_picture_and_page(tmp_path):
    found = analysed()
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    shown = console.export_text()
    assert "own best" in shown and "[" in shown.split("tip")[1]
    page = markdown(found, timings(results_of_arms()))
    assert "| tip | **75.0** | 12.5 |" in page
    assert "| tip | 1e-05 | 75.0 | 62.5 [" in page and "| tip | 0.0001 | 12.5 | 62.5 [" in page
    assert "at which full is best, a choice that favors full" in page
    paths = draw(found, tmp_path)
    assert {path.name for path in paths} == {"rates.png", "rates.svg"}
    before = [path.read_bytes() for path in paths]
    assert before == [path.read_bytes() for path in draw(found, tmp_path)]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text(json.dumps(found))
    assert "Learning rates" in write_report([tmp_path / "study"], tmp_path / "x.html").sections
    html = (tmp_path / "x.html").read_text()
    assert "accuracy against learning rate" in html and "learning rate (logarithmic)" in html
    found["rates"]["arms"][0]["curve"] = []
    (tmp_path / "study" / "results.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match="rates, arms"):
        write_report([tmp_path / "study"], tmp_path / "x.html")


def test_a_folder_is_analysed_with_the_rates_of_its_config(tmp_path):
    for row in results_of_arms():
        place = tmp_path / "arms" / f"{row['name']}-seed{row['seed']}"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(row))
    question = {"equal": "steps", "amount": 10, "metric": "greedy", "collapse_points": 20.0}
    config = {"question": question | {"rates": list(RATES)}, "controls": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert analyse_finished(tmp_path)[0]["rates"]["rates"] == list(RATES)


def test_every_arm_and_control_runs_at_every_rate(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "lab: dialect\nrates: [1e-5, 0.0001]\nseeds: [0]\ngrid: {selector: tip, budget: 0.1}\n"
    )
    study = load_study_file(path)
    assert study.rates == [1e-5, 1e-4]
    arms = {arm.name: arm for arm in expand(study, base_config(study))}
    assert list(arms) == [
        f"{name},lr={rate}"
        for name in ("full", "tip@10%", "random@10%")
        for rate in ("1e-05", "0.0001")
    ]
    tip = arms["tip@10%,lr=1e-05"]
    assert tip.settings == {"selector": "tip", "budget": 0.1, "learning_rate": 1e-5}
    assert tip.controls == {"full": "full,lr=1e-05", "random": "random@10%,lr=1e-05"}
    assert arms["full,lr=0.0001"].settings["learning_rate"] == 1e-4 and arms["full,lr=0.0001"].added


SLIPS = [
    ({"rates": []}, "rates is empty"),
    ({"rates": 1e-5}, "must be a list of numbers"),
    ({"rates": [1e-5, 1e-5]}, "must be different"),
    ({"rates": [1e-5, 1.00000001e-5]}, "must be different"),
    ({"rates": [1e-5, 0]}, "finite numbers above 0"),
    ({"rates": [-1e-5]}, "finite numbers above 0"),
    ({"rates": [float("inf")]}, "finite numbers above 0"),
    ({"rates": [float("nan")]}, "finite numbers above 0"),
    ({"rates": ["fast"]}, "must be a list of numbers, like"),
    ({"rates": [True]}, "must be a list of numbers"),
    (
        {"rates": [1e-5], "arms": [{"learning_rate": 1e-5}]},
        r"arms\[0\]: learning_rate is set by rates",
    ),
    ({"rates": [1e-5], "grid": {"learning_rate": [1e-5]}}, "grid: learning_rate is set by rates"),
    ({"rates": [1e-5], "config": {"learning_rate": 1e-4}}, "is none of rates"),
    ({"rates": [1e-5], "equal": "update_norm", "update_norm": 0.1}, "exclude each other"),
]


@pytest.mark.parametrize(("keys", "message"), SLIPS, ids=[str(keys) for keys, _ in SLIPS])
def test_bad_rates_are_one_clear_message(keys, message):
    with pytest.raises(ConfigError, match=message):
        parse_study_file(GOOD | keys)
