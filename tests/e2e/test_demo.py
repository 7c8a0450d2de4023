"""The whole demo on a lab of a few seconds: files, table, picture, resume, and a student that loads."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from taopd.errors import DataError
from taopd.experiments import pool
from taopd.experiments.lab import build
from taopd.experiments.lab.demo import ARMS, run_demo
from taopd.report.figures.demo import draw, interval, table
from taopd.report.folders import read_folders
from tests import forked_arms

MICRO = {
    "teacher_steps": 10,
    "student_steps": 10,
    "teacher_width": 16,
    "student_width": 16,
    "num_train_prompts": 128,
    "num_test_prompts": 16,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished micro demo: (folder, results, progress calls)."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAOPD_CACHE", str(folder / "cache"))
        patch.setattr(build, "_train_in_processes", build._train_here)
        patch.setattr(pool, "_start", forked_arms.start)
        calls = []
        results = run_demo(
            output_dir=folder / "run",
            steps=3,
            lab_sizes=MICRO,
            progress=lambda *call: calls.append(call),
        )
    return folder / "run", results, calls


@pytest.mark.slow
def test_results_have_the_promised_form(finished):
    folder, results, _ = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert {"task", "base_accuracy", "arms", "versions"} <= results.keys()
    assert [arm["name"] for arm in results["arms"]] == list(ARMS)
    for arm in results["arms"]:
        assert [step for step, _ in arm["accuracy_curve"]] == [0, 3]
        assert arm["accuracy_curve"][-1][1] == arm["accuracy_greedy"]
        assert arm["accuracy_curve"][0][1] == results["base_accuracy"]
        assert sum(arm["selected_share_by_kind"].values()) == pytest.approx(1.0)
        assert arm["steps"] == 3 and arm["train_seconds"] > 0
        assert arm["kept_fraction"] == pytest.approx(
            1.0 if arm["name"] == "full" else 0.1, abs=0.01
        )


@pytest.mark.slow
def test_its_page_shows_no_arm_that_a_longer_demo_left_in_the_folder(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for name, seed in (("full", 1), ("tip", 0)):  # as `taopd demo --all` leaves them
        place = Path(
            shutil.copytree(folder / "arms/full-seed0", folder / f"arms/{name}-seed{seed}")
        )
        arm = json.loads((place / "arm.json").read_text()) | {"name": name, "seed": seed}
        (place / "arm.json").write_text(json.dumps(arm))
    shown = {run.path.name for run in read_folders([folder]).runs}
    assert shown == {f"{name}-seed0" for name in ARMS}


@pytest.mark.slow
def test_progress_ends_at_the_total_and_never_goes_back(finished):
    _, _, calls = finished
    arms = [(done, total) for what, done, total in calls if what == "steps of all arms"]
    assert arms[-1] == (12, 12)
    assert all(a <= b for a, b in itertools.pairwise(arms))


@pytest.mark.slow
def test_a_second_run_is_refused_and_resume_keeps_finished_arms(finished, monkeypatch):
    folder, results, _ = finished
    monkeypatch.setenv("TAOPD_CACHE", str(folder.parent / "cache"))
    with pytest.raises(DataError, match="--overwrite"):
        run_demo(output_dir=folder, steps=3, lab_sizes=MICRO)
    again = run_demo(output_dir=folder, steps=3, lab_sizes=MICRO, resume=True)
    assert again["arms"] == results["arms"]
    # Arms of 3 steps, or of another lab, are not those that these ask for.
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    for other in ({"steps": 4}, {"steps": 3, "variant": "fallible"}):
        with pytest.raises(DataError, match="arm full-seed0 finished with other settings"):
            run_demo(output_dir=folder, lab_sizes=MICRO, resume=True, **other)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


@pytest.mark.slow
def test_the_best_student_loads_and_the_picture_is_drawn(finished):
    folder, results, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "best-student")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "best-student"))
    paths = draw(results, folder)
    assert [path.name for path in paths] == ["accuracy.png", "accuracy.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(results))
    shown = console.export_text()
    assert all(name in shown for name in ARMS)


def test_intervals_are_wilson_for_one_seed_and_the_range_for_several():
    low, high = stats.binomtest(45, 50).proportion_ci(method="wilson")
    assert interval([0.9], 50) == pytest.approx((0.9, low, high))
    assert interval([0.2, 0.9, 0.7], 50) == pytest.approx((0.6, 0.2, 0.9))
