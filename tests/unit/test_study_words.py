"""What tables, verdict and warnings say of a study: the right metric, control, seeds and steps."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from taopd.experiments.arm_observers import StopRule
from taopd.experiments.study.analysis import METRICS, Question, analyse
from taopd.report.figures.study import _mean, draw
from taopd.report.folders import Sources, Study
from taopd.report.sections.accuracy import body, estimates_of
from taopd.report.sections.headline import headline
from taopd.report.sections.warnings import warnings
from taopd.report.study_table import markdown, table
from tests.unit.study_simulation import outcome


def rivals(**of_arms):
    """Two seeds of full, of teachability at 10 %, and of random tokens at 5 and at 10 %."""
    rows = []
    for name, selector, budget, greedy, sampled in (
        ("full", "full", 1.0, 0.9, 0.5),
        ("teachability@10%", "teachability", 0.1, 0.8, 0.7),
        ("random@5%", "random", 0.05, 0.6, 0.66),
        ("random@10%", "random", 0.1, 0.75, 0.72),
    ):
        ends = {
            "num_test_prompts": 100,
            "accuracy_sampled": sampled,
            "accuracy_sampled_curve": [[0, 0.1], [10, sampled]],
            "steps": 10,
        }
        rows += [outcome(name, selector, budget, s, greedy, **ends | of_arms) for s in (0, 1)]
    return rows


def said(results):
    return headline(Sources(studies=[Study(name="s", path=Path("s"), results=results)]))


def test_sampled_accuracy_stands_beside_sampled_accuracy():
    sampled, greedy = (analyse(rivals(), question=Question(metric=m)) for m in METRICS[::-1])
    assert [arm["base_accuracy"] for arm in sampled["arms"]] == [pytest.approx(0.1)] * 4
    assert "student before 10.0" in markdown({"title": "s"} | sampled, [])
    assert "student before 40.0" in markdown({"title": "s"} | greedy, [])
    assert "random@10% ends highest, with 72.0 %" in said(sampled)
    assert "2.0 points below random tokens at the same budget" in said(sampled)


def test_the_verdict_takes_random_tokens_of_the_same_budget():
    assert "full ends highest" in said(analyse(rivals()))
    assert "5.0 points above random tokens at the same budget" in said(analyse(rivals()))
    alone = {"arms": [], "outcomes": rivals()}
    assert "5.0 points above random@10%" in said(alone)


def test_the_verdict_names_all_that_end_highest():
    both = [row for row in rivals(accuracy_greedy=1.0) if row["budget"] > 0.05]
    assert "full and teachability@10% end highest" in said(analyse(both[:4]))
    assert "4 of 4 arms end highest" in said(analyse(rivals(accuracy_greedy=1.0)))


def test_equal_accuracies_of_all_seeds_have_an_interval_of_the_rounding():
    arm = analyse(rivals())["arms"][0]
    half = stats.t.ppf(0.975, 1) * 0.01 / np.sqrt(12) / np.sqrt(2)
    assert arm["greedy"]["high"] - arm["greedy"]["mean"] == pytest.approx(half)
    study = Study(name="s", path=Path("s"), results={"outcomes": rivals()})
    assert estimates_of(study)["full"]["greedy"][1] == pytest.approx(0.9 - half)


def test_the_mean_curve_is_over_steps_that_all_seeds_have():
    ends_early, ends_late = [[0, 10], [10, 20], [13, 50]], [[0, 20], [10, 40], [20, 60], [22, 90]]
    mean = _mean([np.array(ends_early, float), np.array(ends_late, float)])
    assert mean.tolist() == [[0, 10], [15, 30]]


@pytest.mark.parametrize(
    ("of_one", "equal", "words"),
    [
        ({"steps": 5}, "steps", "it took 5 steps, not 10"),
        ({"steps": 5, "stopped_by": "collapse_guard"}, "steps", "guard ended seeds [0, 1] early"),
        ({"stopped_by": "max_steps"}, "seconds", "seeds [0, 1] reached max_steps before"),
    ],
)
def test_an_arm_that_has_not_what_all_have_is_named_wherever_the_table_is(of_one, equal, words):
    rows = rivals()
    rows[:2] = [row | of_one for row in rows[:2]]
    found = {"title": "s"} | analyse(rows, question=Question(equal=equal, amount=10))
    console = Console(width=400, record=True)
    console.print(table(found))
    sources = Sources(studies=[Study(name="s", path=Path("s"), results=found)])
    for text in (console.export_text(), markdown(found, []), warnings(sources, [])):
        assert " ".join(text.split()).count(words) == 1


def test_collapse_on_the_page_is_by_the_study_s_own_limit():
    fell = rivals(accuracy_curve=[[0, 0.4], [5, 0.9], [10, 0.78]])[:2]
    for points, told in ((20.0, False), (10.0, True)):
        found = analyse(fell, question=Question(collapse_points=points))
        study = Study(name="s", path=Path("s"), results=found)
        assert (f"more than {points:g} points" in warnings(Sources(studies=[study]), [])) is told


@pytest.mark.parametrize(("step", "reason"), [(10, "max_steps"), (7, "collapse_guard")])
def test_an_arm_that_ends_before_its_last_step_says_why(step, reason):
    rule = StopRule(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    rule.on_train_end(SimpleNamespace(max_steps=10), SimpleNamespace(global_step=step), None)
    assert rule.reason == reason


def test_a_floor_of_arms_with_one_seed_is_not_said_of_all():
    rows = rivals()
    assert "cannot be told apart with 2 seeds" in analyse(rows)["noise_floor"]["words"]
    words = analyse(rows[:-1])["noise_floor"]["words"]  # random@10% lacks its second seed
    assert words.startswith("Some arms have one seed in common")
    assert analyse(rows[::2])["noise_floor"]["words"].startswith("With one seed nobody can say")


def test_a_title_is_text_and_no_formula(tmp_path):
    picture = draw({"title": "for $5 or $_{6 a day"} | analyse(rivals()), tmp_path)[0]
    assert picture.stat().st_size > 1000


def test_a_long_name_of_an_arm_takes_no_room_from_the_numbers():
    """80 columns are what an output has that goes to a file."""
    name = "teachability,loss=sampled_reverse_kl,learning_rate=1e-05,budget=0.1"
    rows = [outcome("full", "full", 1.0, seed, 0.9) for seed in (0, 1)]
    rows += [outcome(name, "teachability", 0.1, seed, 0.75 + 0.01 * seed) for seed in (0, 1)]
    console = Console(file=io.StringIO(), width=80)
    console.print(table({"title": "x"} | analyse(rows)))
    shown = console.file.getvalue()
    heads = next(line.split() for line in shown.splitlines() if line.startswith(" arm"))
    assert heads == ["arm", "mean", "med.", "coll.", "to", "full", "p", "to", "random", "p"]
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown and "75.5" in shown and "-14.5" in shown


def test_two_seeds_that_tell_nothing_are_said_to_in_words_and_within_what_is_possible():
    """The verdict said -561 to +664 points, and "it is above 100 points" of nothing that was named."""
    ends = {"full": (0.1, 0.9), "teachability@10%": (0.9, 0.9), "random@10%": (0.0, 0.95)}
    rows = [
        outcome(name, name.partition("@")[0], 1.0 if name == "full" else 0.1, seed, value)
        for name, values in ends.items()
        for seed, value in enumerate(values)
    ]
    found = analyse(rows)
    floor = found["noise_floor"]["words"]
    assert floor.startswith("No two accuracies can be told apart") and "100 points" not in floor
    assert "(-100 to +100), which decides nothing" in said(found).replace("\u2212", "-")
    page = body([Study(name="s", path=Path("s"), results=found)]).replace("\u2212", "-")
    ends = {
        float(number)
        for pair in re.findall(r"([-+][\d.]+) to ([-+][\d.]+)", page)
        for number in pair
    }
    assert {-100.0, 100.0} <= ends and max(map(abs, ends)) == 100.0
