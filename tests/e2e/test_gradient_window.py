"""The trainer with a gradient window: same selection and loss, the gradient that `test_sparse.py` proves."""

import pytest
import torch
from test_trainer import (
    gradients_on_fixed_completions,
    make_trainer,
    relative_error,
    train_once,
    weights_of,
)

from tests.conftest import is_documented

LONG = 64
SETTINGS = {"budget": 0.15, "anchor_coef": 0.5}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("window", [0, 2, LONG])
def test_loss_is_that_of_the_exact_step_and_a_long_window_its_gradient(
    micro_lab, tmp_path, accumulation, window
):
    """Anchored tokens take part; some micro-batches of 4 keep nothing in some rows."""
    batch = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
    }
    exact_loss, exact = gradients_on_fixed_completions(
        make_trainer(micro_lab, tmp_path / "a", **SETTINGS, **batch)
    )
    trainer = make_trainer(micro_lab, tmp_path / "b", **SETTINGS, **batch, gradient_window=window)
    loss, gradients = gradients_on_fixed_completions(trainer)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    share = trainer._recorder.flush()["sparse/gradient_share"]
    if window == LONG:
        for name, gradient in exact.items():
            assert relative_error(gradients[name], gradient) < 1e-5, name
        assert share > 0.75  # Not after the last kept token of a row.
    else:
        assert 0.0 < share < 0.7
        assert any(relative_error(gradients[name], exact[name]) > 1e-2 for name in exact)


def test_a_run_logs_share_and_fidelity_and_the_check_changes_nothing(micro_lab, tmp_path):
    settings = SETTINGS | {"max_steps": 3, "gradient_window": 2, "gradient_accumulation_steps": 2}
    settings["per_device_train_batch_size"] = 4
    plain, _ = train_once(micro_lab, tmp_path / "a", **settings)
    checked, _ = train_once(micro_lab, tmp_path / "b", **settings, gradient_check_every=2)
    expected = weights_of(plain)
    assert all(torch.equal(w, expected[name]) for name, w in weights_of(checked).items())
    entries = [entry for entry in checked.state.log_history if "loss" in entry]
    for step, entry in enumerate(entries):
        ours = {key for key in entry if key.startswith(("sparse/", "perf/"))}
        assert {key for key in ours if not is_documented(key)} == set()
        assert 0 < entry["sparse/gradient_share"] < 1
        assert ("sparse/gradient_cosine" in entry) == (step % 2 == 0)
    assert 0.2 < entries[0]["sparse/gradient_cosine"] < 1
    assert entries[0]["sparse/gradient_norm_ratio"] > 0
    assert not any("sparse/gradient_cosine" in entry for entry in plain.state.log_history)


def test_a_window_of_the_whole_sequence_has_cosine_one(micro_lab, tmp_path):
    trainer, _ = train_once(micro_lab, tmp_path, gradient_window=LONG, gradient_check_every=1)
    entry = trainer.state.log_history[0]
    assert entry["sparse/gradient_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert entry["sparse/gradient_norm_ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"num_iterations": 2, "loss": "sampled_reverse_kl"},
        {"selector": "random", "min_keep": 1, "loss": "forward_kl"},
    ],
    ids=str,
)
def test_trains_with(micro_lab, tmp_path, settings):
    """Each step compares the sparse with the prefix pass, so a run that ends has agreed throughout."""
    trainer, _ = train_once(
        micro_lab, tmp_path, max_steps=3, gradient_window=2, gradient_check_every=1, **settings
    )
    assert trainer.state.log_history[0]["sparse/gradient_cosine"] > 0


@pytest.mark.parametrize("method", ["reach", "published"])
def test_a_micro_batch_of_empty_completions_has_no_prefix_to_read(micro_lab, tmp_path, method):
    """Nothing trains there, and its one row was left out of the scoring pass."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(micro_lab, tmp_path, method=method, gradient_window=2, **split)

    def one_of_eight(prompts, *_, **__):
        completions = [[7, 9, 11] if row == 5 else [] for row in range(len(prompts))]
        trainer.nonfinite.sampled(completions)
        return [ids or [2] for ids in completions]

    trainer._generate_single_turn = one_of_eight
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["select/valid_tokens"] == 3


def test_lora_with_dropout_and_an_anchor(micro_lab, tmp_path):
    from peft import LoraConfig

    trainer = make_trainer(
        micro_lab,
        tmp_path,
        peft_config=LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
        ),
        anchor_coef=1.0,
        max_steps=2,
        learning_rate=1e-2,
        gradient_window=2,
    )
    before = weights_of(trainer)
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)


def test_evaluation_does_not_depend_on_the_window(micro_lab, tmp_path):
    exact = make_trainer(micro_lab, tmp_path / "a")
    windowed = make_trainer(micro_lab, tmp_path / "b", gradient_window=0)
    for trainer in (exact, windowed):
        trainer.model.eval()
    with torch.no_grad():
        losses = []
        for trainer in (exact, windowed):
            batch = next(iter(trainer.get_train_dataloader()))
            torch.manual_seed(0)
            losses.append(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)))
    assert torch.equal(*losses)
