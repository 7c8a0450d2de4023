"""The guard in a real run: silent, or stopping it with the reason."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_trainer import CPU, make_trainer
from transformers import TrainerCallback, TrainerControl

from taopd import TeachabilityConfig, TeachabilityTrainer, load_prompts
from taopd.experiments.arm import run_arm
from taopd.experiments.arm_settings import Arm
from taopd.experiments.kept_arms import prepare
from taopd.runs.checkpoints import STATE
from taopd.signals import SignalTable
from taopd.trainer.watches import collapse_detector as collapse_watch
from taopd.trainer.watches.collapse_guard import CollapseGuard
from tests.conftest import make_checkpoint

EVERYWHERE = {"anchor_fraction": 1.0, "anchor_responses": 1.0, "guard_every": 1}


def read_warnings(folder):
    path = folder / "run/warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_short_run_is_watched_and_nothing_is_found(micro_lab, tmp_path):
    settings = EVERYWHERE | {"collapse_guard": "warn", "budget": 0.2, "max_steps": 4}
    trainer = make_trainer(micro_lab, tmp_path, **settings)
    trainer.train()
    drift = [
        entry["guard/idle_drift_nats"]
        for entry in trainer.state.log_history
        if "guard/idle_drift_nats" in entry
    ]
    assert len(drift) == 4 and drift[0] < 1e-5
    assert read_warnings(tmp_path) == []


def test_stop_ends_the_run_with_the_reason(micro_lab, tmp_path, monkeypatch):
    # A bound that the first update breaks: every step moves the student a little.
    monkeypatch.setattr(collapse_watch, "DRIFT_LIMIT", 1e-5)
    # The entropy of these models hardly moves.
    monkeypatch.setattr(collapse_watch, "OF_FIRST", 0.5)
    settings = EVERYWHERE | {"budget": 0.2, "max_steps": 20, "learning_rate": 1e-2}
    stopped = make_trainer(micro_lab, tmp_path / "a", collapse_guard="stop", **settings)
    stopped.train()
    assert 1 < stopped.state.global_step < 20
    (warning,) = read_warnings(tmp_path / "a")
    assert "moved away" in warning["reason"] and "less sure" in warning["reason"]


def test_off_runs_no_reference(micro_lab, tmp_path):
    trainer = make_trainer(
        micro_lab, tmp_path, budget=0.2, max_steps=1, method="published", collapse_guard="off"
    )
    assert trainer._anchor._reference is None
    trainer.train()
    assert not any("guard/idle_drift_nats" in entry for entry in trainer.state.log_history)


def test_restore_loads_the_last_whole_checkpoint_from_before_the_signs(tmp_path):
    for step in (5, 9, 10, 15):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / STATE).write_text("torn")
    loaded = []
    guard = CollapseGuard(
        "restore", str(tmp_path), Accelerator(cpu=True), print, print, loaded.append
    )
    for step, drift in ((0, 0.0), (5, 0.01), (10, 0.02), (15, 1.0)):
        guard.watch.update(step, {"idle_drift": drift})
    control = TrainerControl()
    guard.on_step_end(None, None, control)
    guard.on_train_end(None, None, control)
    assert control.should_training_stop and loaded == [str(tmp_path / "checkpoint-9")]


RESTORE = EVERYWHERE | {
    "collapse_guard": "restore",
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 8,
}


@pytest.fixture
def collapses(monkeypatch):
    """Every run shows a sign of collapse at its fourth step, and was healthy after two."""

    def update(watch, step, values):
        watch.healthy_step, new = 2, step >= 3 and not watch.fired
        watch.fired |= {"entropy": step} if new else {}
        return ["it was made to"] if new else []

    monkeypatch.setattr(collapse_watch.CollapseWatch, "update", update)


def test_a_callback_sees_the_restored_weights_at_the_end(micro_lab, tmp_path, collapses):
    seen = {}

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen.update({name: each.clone() for name, each in model.state_dict().items()})

    trainer = TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=str(micro_lab.teacher),
        args=TeachabilityConfig(
            output_dir=str(tmp_path), **CPU | RESTORE | {"learning_rate": 1e-2}
        ),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
        callbacks=[Look()],
    )
    trainer.train(check=False)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved and all(torch.equal(seen[name], value) for name, value in saved.items())
    assert trainer.state.global_step == 4 and trainer.guard.restored


def test_an_arm_is_graded_by_the_student_that_the_guard_leaves(
    micro_lab, tmp_path, collapses, monkeypatch
):
    """Also where an evaluation was due at the step that ended it."""
    graded = []
    monkeypatch.setattr(
        "taopd.experiments.arm_observers.evaluate",
        lambda model, *_, **__: (
            graded.append(model.state_dict()["lm_head.weight"].clone())
            or SimpleNamespace(accuracy=0.5, transcripts=[{"correct": True, "num_tokens": 1}])
        ),
    )
    arm = Arm(
        name="guarded",
        seed=0,
        config=RESTORE | {"max_completion_length": 6, "learning_rate": 1e-2, "score_top_k": 4},
        student=str(micro_lab.student),
        teacher=str(micro_lab.teacher),
        prompts=str(micro_lab.prompts),
        match="auto",
        evaluate_every=2,
        num_test_prompts=8,
    )
    folder = tmp_path / "guarded"
    prepare([(arm, folder)])
    results = run_arm(arm, folder)
    assert results["stopped_by"] == "collapse_guard"
    assert [step for step, _ in results["accuracy_curve"]] == [0, 2, 4, 4]
    saved = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert torch.equal(graded[-1], saved["lm_head.weight"])
    assert not torch.equal(graded[-3], graded[-1])


@pytest.mark.parametrize("settings", [{"selector": "full"}, {"budget": 1.0}], ids=str)
@pytest.mark.parametrize("method", ["anchored", "published", "reach"])
def test_where_everything_is_selected_the_guard_looks_all_the_same(
    micro_lab, tmp_path, settings, method
):
    """There is nothing to hold then, and the loss is the distillation alone."""
    trainer = make_trainer(
        micro_lab, tmp_path, method=method, max_steps=2, **EVERYWHERE, **settings
    )
    seen = []
    trainer.observers.append(seen.append)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("guard/idle_drift_nats" in entry for entry in logs)
    for scored in seen:
        assert bool(scored.choice.selection.kept.all())
        assert not bool(scored.choice.anchor_weights.any())


def test_the_guard_reads_means_over_valid_tokens(tmp_path):
    """Two completions of three tokens, the last of which is padding."""
    entropy = torch.linspace(0.1, 1.0, 6).double()
    table = SignalTable(
        disagreement=entropy,
        compatibility=entropy,
        entropy=entropy,
        completion=torch.arange(6) // 3,
        position=torch.arange(6) % 3,
        valid=torch.tensor([True] * 5 + [False]),
    )
    guard = CollapseGuard(
        "warn", str(tmp_path), Accelerator(cpu=True), lambda *_: None, print, print
    )
    told = []
    guard.watch = SimpleNamespace(update=lambda step, values: told.append(values) or [])
    choice = SimpleNamespace(selection=SimpleNamespace(num_valid=5))
    guard.measure(5, table, choice, torch.tensor([0.2, 0.4]))
    expected = {"entropy": float(entropy[:5].mean()), "length": 2.5, "idle_drift": 0.3}
    assert told == [pytest.approx(expected, rel=1e-6)]
    # A process whose tokens are all selected has no drift to measure.
    guard.measure(10, table, choice, torch.zeros(0))
    assert "idle_drift" not in told[1]
