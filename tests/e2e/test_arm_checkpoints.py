"""A long arm goes on from its own checkpoint. Oracle: the same arm that nobody stopped."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
from test_demo import MICRO

from taopd.errors import ResourceError
from taopd.experiments import arm_observers
from taopd.experiments.arm import run_arm
from taopd.experiments.kept_arms import prepare
from taopd.experiments.lab.build import build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.runs.checkpoints import checkpoints
from taopd.runs.jsonl import read_jsonl
from taopd.trainer.watches import collapse_detector

CLOCK = ("train_seconds", "train_seconds_curve")


class Killed(BaseException):
    """Nothing in between answers it, as nothing answers a kill."""


@pytest.fixture(scope="module")
def arm(lab_cache):
    lab = build_lab("dialect", **MICRO)
    # Two steps use each generation batch.
    settings = {"selector": "teachability", "budget": 0.25, "num_iterations": 2}
    made = lab_arm(lab, "reach", settings, seed=3, steps=6)
    return replace(made, evaluate_every=2, num_test_prompts=8)


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    points = read_jsonl(folder / "accuracy.jsonl")
    for line in (results, *points):
        for name in CLOCK:
            line.pop(name, None)
    return results, points


def prepared(arm, folder):
    prepare([(arm, folder)])
    return folder


def stopped(arm, folder, monkeypatch, *, at_step):
    """An arm that saves after every step and is killed once it has saved this one."""
    saved = arm_observers.ArmCheckpoints.on_save

    def on_save(self, args, state, control, **kwargs):
        saved(self, args, state, control, **kwargs)
        if state.global_step == at_step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(arm_observers, "EVERY_SECONDS", 0.0)
        patch.setattr(arm_observers, "LARGEST_SHARE", 1e9)
        patch.setattr(arm_observers.ArmCheckpoints, "on_save", on_save)
        with pytest.raises(Killed):
            run_arm(arm, prepared(arm, folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4], ids=["in a generation batch", "after an evaluation"])
def test_a_killed_arm_ends_as_if_nobody_had_killed_it(arm, step, tmp_path, monkeypatch):
    run_arm(arm, prepared(arm, tmp_path / "whole"))
    folder = stopped(arm, tmp_path / "killed", monkeypatch, at_step=step)
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}"]

    prepare([(arm, folder)])
    assert checkpoints(folder)
    begun = []
    measure = arm_observers.AccuracyCurve.measure

    def measured(self, model, step):
        begun.append(step)
        measure(self, model, step)

    monkeypatch.setattr(arm_observers.AccuracyCurve, "measure", measured)
    run_arm(arm, folder)
    assert begun == [after for after in (2, 4, 6) if after > step]
    assert read(folder) == read(tmp_path / "whole")
    left = [{path.name for path in each.iterdir()} for each in (folder, tmp_path / "whole")]
    assert left[0] == left[1]


GUARD = {"collapse_guard": "stop", "guard_every": 1, "method": "anchored", "learning_rate": 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "config", "reason"),
    [
        ({}, {}, "max_steps"),
        ({"max_selected_tokens": 250}, {}, "selected_tokens"),
        ({}, GUARD | {"anchor_fraction": 1.0, "anchor_responses": 1.0}, "collapse_guard"),
    ],
    ids=["max_steps", "selected_tokens", "collapse_guard"],
)
def test_an_arm_killed_before_its_results_ends_where_it_had_ended(
    arm, limits, config, reason, tmp_path, monkeypatch
):
    """With checkpoints that its settings ask for, at every step."""
    # A bound that the first updates break.
    monkeypatch.setattr(collapse_detector, "DRIFT_LIMIT", 1e-5)
    monkeypatch.setattr(collapse_detector, "OF_FIRST", 0.5)
    saving = {"save_strategy": "steps", "save_steps": 1}
    arm = replace(arm, config=arm.config | saving | config, **limits)
    folder = prepared(arm, tmp_path / "arm")
    run_arm(arm, folder)
    whole = read(folder)
    assert whole[0]["stopped_by"] == reason
    assert (whole[0]["steps"] == 6) is (reason == "max_steps")

    (folder / "results.json").unlink()
    run_arm(arm, prepared(arm, folder))
    assert read(folder) == whole


@pytest.mark.slow
def test_what_another_arm_has_begun_is_cleared(arm, tmp_path, monkeypatch):
    folder = stopped(arm, tmp_path / "killed", monkeypatch, at_step=2)
    for place, other in (
        ("settings", replace(arm, config=arm.config | {"budget": 0.5})),
        ("damaged", arm),
    ):
        copy = tmp_path / place
        shutil.copytree(folder, copy)
        if other is arm:
            (copy / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        prepare([(other, copy)])
        assert sorted(path.name for path in copy.iterdir()) == ["arm.json", "inputs.json"]


@pytest.mark.slow
def test_no_checkpoint_where_it_would_fill_the_disk(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(arm_observers, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(arm_observers, "ROOM", 1e18)
    seen = []
    monkeypatch.setattr(arm_observers.ArmCheckpoints, "on_save", lambda *_, **__: seen.append(1))
    run_arm(arm, prepared(arm, tmp_path / "arm"))
    assert not seen


@pytest.mark.slow
def test_an_arm_on_a_full_disk_names_the_way_of_the_study(arm, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(arm_observers.StopRule, "on_step_end", full)
    with pytest.raises(ResourceError, match=r"metrics\.jsonl.*runs this arm again with --resume"):
        run_arm(arm, prepared(arm, tmp_path / "arm"))
