"""The rule for the default, on made-up curves. Oracle: the rule's text in docs/results/default.md."""

import json
import sys

import numpy as np
import pytest
from scipy import stats

from scripts import default_method
from scripts.default_method import ARMS, MEASURED, known_parts
from scripts.pages.default_method import (
    choice,
    choice_table,
    dip_table,
    generated,
    judged,
    passes,
    standing,
)
from taopd.experiments.lab import VARIANTS

pytestmark = pytest.mark.usefixtures("own_labs")


def part(**arms):
    """A lab with three seeds: name -> (best, end) of each seed."""
    at_ten = [name for name in ARMS if name.endswith("@0.1")]
    names = {"full": "full"} | {name.split("@")[0].replace(" ", "_"): name for name in at_ten}
    made = {
        names[key]: {
            "kept": 0.1,
            "greedy": [[0.0, best, end] for best, end in seeds],
            "sampled": [[0.0, best, end] for best, end in seeds],
        }
        for key, seeds in arms.items()
    }
    return {"variant": "made", "loss": "reverse_kl", "steps": [0, 100, 200], "arms": made}


FLAT = [(0.9, 0.9)] * 3


def test_the_shortfall_is_to_the_best_rival_at_its_own_best_checkpoint():
    lab = part(full=[(0.95, 0.2)] * 3, published=FLAT, reach=[(0.94, 0.94), (0.9, 0.9), (0.8, 0.8)])
    found = standing(lab, "reach@0.1")
    differences = [1.0, 5.0, 15.0]
    low, high = stats.t.interval(
        0.95, 2, loc=np.mean(differences), scale=np.std(differences, ddof=1) / 3**0.5
    )
    assert (found.shortfall, found.low, found.high) == pytest.approx((7.0, low, high))
    assert found.verdict == "cannot tell"


@pytest.mark.parametrize(
    ("reach", "verdict"),
    [
        ([(0.9, 0.9)] * 3, "holds"),
        # One seed has no interval.
        ([(0.9, 0.9)], "cannot tell"),
        ([(0.7, 0.7)], "cannot tell"),
        ([(0.92, 0.92)] * 3, "holds"),
        ([(0.7, 0.7)] * 3, "loses"),
        ([(0.9, 0.9), (0.9, 0.9), (0.9, 0.65)], "1 collapsed"),
    ],
)
def test_a_lab_tells_where_the_interval_lies_on_one_side_of_a_point(reach, verdict):
    lab = part(full=FLAT, published=FLAT, reach=reach)
    assert standing(lab, "reach@0.1").verdict == verdict
    assert passes(judged([lab], "reach@0.1")) == (verdict in ("holds", "cannot tell"))
    assert passes(judged([lab], "published@0.1"))
    row = next(
        line for line in choice_table([lab]).splitlines() if line.startswith("| reach, 10 %")
    )
    assert row.endswith("| yes |" if verdict in ("holds", "cannot tell") else "| no |")


def labs_of(**arms):
    """Every lab with the exact loss, all alike."""
    return [part(**arms) | {"variant": name} for name in VARIANTS]


def test_one_that_passes_is_chosen_and_else_the_smallest_worst_shortfall():
    """By the labs that all have: one that misses a lab, or a lab that one misses, does not decide."""
    flat, low, lower = FLAT, [(0.5, 0.5)] * 3, [(0.4, 0.4)] * 3
    full = [(0.95, 0.95)] * 3
    labs = labs_of(full=full, published=lower, anchored=low, reach=full, raw_C=full)
    del labs[3]["arms"]["raw C@0.1"]
    assert "the default is one that passes: reach, 10 %." in choice(labs)
    labs = labs_of(full=full, published=lower, anchored=low, reach=flat, raw_C=flat)
    del labs[3]["arms"]["raw C@0.1"]
    labs.append(labs[0] | {"loss": "sampled_reverse_kl", "arms": dict(labs[0]["arms"])})
    labs[-1]["arms"]["anchored@0.1"] = part(anchored=[(0.1, 0.1)] * 3)["arms"]["anchored@0.1"]
    del labs[-1]["arms"]["reach@0.1"]
    said = choice(labs)
    assert (
        f"The {len(VARIANTS)} labs that anchored, 10 %, reach, 10 %, published, 10 % all have"
        in said
    )
    assert "has reach, 10 %, 5.0 points (anchored, 10 % 45.0, published, 10 % 55.0)" in said
    assert "no choice yet" in choice(labs[1:-1])


def test_one_that_was_run_with_one_loss_does_not_keep_the_other_from_deciding():
    full, lost = [(0.95, 0.95)] * 3, [(0.5, 0.5)] * 3
    exact = labs_of(full=full, published=lost, anchored=lost, reach=full, raw_C=full)
    sampled = [
        lab | {"loss": "sampled_reverse_kl"}
        for lab in labs_of(full=full, published=lost, anchored=lost, reach=lost)
    ]
    said = choice(exact + sampled)
    assert said.startswith(
        f"The {2 * len(VARIANTS)} labs that anchored, 10 %, reach, 10 %, published"
    )
    assert "none passes" in said and "raw C" not in said


def test_a_dip_is_counted_from_the_best_before_it():
    """A rise afterwards does not hide it; a lab that an arm lacks is in no mean."""
    falls = [(0.9, 0.4), (0.9, 0.9)]
    lab = part(full=falls, published=FLAT, anchored=FLAT, reach=FLAT)
    assert "| full | 1 | 25 | 50 |" in dip_table([lab, part(full=FLAT)])
    assert "| reach, 10 % | 1 | 0 | 0 |" in dip_table([lab])
    assert "no lab has all arms" in dip_table([part(full=FLAT)])


def test_an_arm_without_rivals_is_left_out_and_the_page_says_so():
    lab = part(published=FLAT, reach=FLAT)
    assert standing(lab, "reach@0.1") is None
    (absent,) = [row for row in generated([lab]).splitlines() if row.startswith("- Not run: ")]
    assert " full; " in absent and absent.endswith(", in made (exact reverse KL).")


def test_seeds_that_no_rival_has_are_named():
    """They are in no difference, and would be missing without a word."""
    lab = part(full=FLAT, published=FLAT, reach=[*FLAT, (0.9, 0.1)])
    found = standing(lab, "reach@0.1")
    assert found.seeds == 3 and found.shortfall == pytest.approx(0.0) and found.collapsed == 1
    assert "lacks are in the ends and in no shortfall: reach, 10 %, in made (" in generated([lab])
    assert "in no shortfall" not in generated([part(full=FLAT, published=FLAT, reach=FLAT)])


def test_arms_that_started_from_other_models_are_named():
    """They would be compared with the rivals as if the lab were the same."""
    same = part(full=FLAT, published=FLAT, reach=FLAT)
    assert "other models" not in generated([same]) and "same models" not in generated([same])
    other = part(full=FLAT, published=FLAT, reach=FLAT)
    other["arms"]["reach@0.1"]["greedy"][1][0] = 0.3
    assert "the same models as full" in generated([other])
    assert "the same models as full: reach, 10 %, in made (" in generated([other])


def test_what_was_measured_before_has_the_same_settings():
    """An arm of collapse.json is taken by its name: the settings behind the name must be these."""
    from scripts import collapse

    for name in ("full", "published@0.1", "anchored@0.1"):
        assert collapse.MAIN[name] == {"budget": 0.1} | ARMS[name] or name == "full"
    assert collapse.MAIN["full"] == ARMS["full"]
    assert all("reach@0.1" not in known["arms"] for known in known_parts(MEASURED).values())


def row_of(seed, end):
    """The result of one arm, as a job writes it."""
    curve = [[0, 0.0], [100, 0.5], [200, end]]
    return {
        "name": "reach@0.1",
        "seed": seed,
        "kept_fraction": 0.2,
        "accuracy_curve": curve,
        "accuracy_sampled_curve": curve,
    }


def gathered(tmp_path, monkeypatch, seeds):
    """The file after a job that ran these seeds of reach in *dialect*; three were known before."""
    before = part(full=FLAT, published=FLAT, reach=FLAT) | {"variant": "dialect"}
    output, runs = tmp_path / "default.json", tmp_path / "runs"
    output.write_text(json.dumps({"parts": [before, before | {"variant": "accent"}]}))
    runs.mkdir()
    rows = [row_of(seed, 0.6 + seed / 100) for seed in seeds]
    about = {"variant": "dialect", "loss": "reverse_kl", "arms": rows}
    (runs / "reach__dialect.json").write_text(json.dumps(about))
    monkeypatch.setattr(default_method, "MEASURED", tmp_path / "none.json")
    arguments = ["default_method", "--runs", str(runs), "--output", str(output), "--gather"]
    monkeypatch.setattr(sys, "argv", arguments)
    default_method.main()
    found = {each["variant"]: each["arms"] for each in json.loads(output.read_text())["parts"]}
    assert found["accent"] == before["arms"]
    assert found["dialect"]["full"] == before["arms"]["full"]
    return found["dialect"]["reach@0.1"]


def test_gathering_adds_seeds_to_those_measured_before(tmp_path, monkeypatch):
    """Labs, losses and arms that are in the file stay as they are."""
    reach = gathered(tmp_path, monkeypatch, [3, 4])
    assert [curve[-1] for curve in reach["greedy"]] == [0.9, 0.9, 0.9, 0.63, 0.64]
    assert reach["greedy"] == reach["sampled"]
    assert reach["kept"] == pytest.approx((3 * 0.1 + 2 * 0.2) / 5)


def test_gathering_replaces_a_seed_that_ran_again(tmp_path, monkeypatch):
    reach = gathered(tmp_path, monkeypatch, [1])
    assert [curve[-1] for curve in reach["greedy"]] == [0.9, 0.61, 0.9]


def test_gathering_refuses_a_gap_in_the_seeds(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"reach@0.1: seeds \[0, 1, 2, 4\] have a gap"):
        gathered(tmp_path, monkeypatch, [4])


def test_only_arms_and_seeds_that_are_not_known_are_run(tmp_path):
    known = {("dialect", "reverse_kl"): part(full=FLAT, published=FLAT, reach=FLAT)}
    jobs = default_method.make_jobs(tmp_path, ["dialect"], ["main", "reach"], known, 4)
    assert [[(arm.name, arm.seed) for arm in job.arms] for job in jobs] == [
        [("full", 3), ("published@0.1", 3), *[("anchored@0.1", seed) for seed in range(4)]],
        [("reach@0.1", 3)],
    ]
    assert default_method.make_jobs(tmp_path, ["dialect"], ["reach"], known, 3) == []
    # `--again` knows nothing.
    again = default_method.make_jobs(tmp_path, ["dialect"], ["reach"], {}, 3)
    assert [arm.seed for arm in again[0].arms] == [0, 1, 2]
