"""The scoring pass as training forward, or as prefix: the same step with fewer forwards."""

import logging

import pytest
import torch
from test_trainer import make_trainer, relative_error, train_once, weights_of
from torch import nn

from taopd.trainer.student import _drops_units

BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def count_forwards(trainer, steps=1):
    """Calls of the student's backbone per step outside of generation, and the trained weights."""
    backbone, calls = trainer.model.model, []
    trainer._teacher._agreed = True  # once a run, not once a step

    def count(module, args, kwargs):
        cached = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False or type(cached).__name__ == "Cache":
            calls.append(kwargs["input_ids"].shape)

    handle = backbone.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    handle.remove()
    return len(calls) / steps


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_the_scoring_pass_is_the_training_forward(micro_lab, tmp_path, loss):
    settings = {"budget": 0.2, "anchor_coef": 0.5, "loss": loss, "max_steps": 3} | BATCH
    once = make_trainer(micro_lab, tmp_path / "once", **settings)
    assert count_forwards(once, 3) == 1
    twice = make_trainer(micro_lab, tmp_path / "twice", **settings)
    twice._student._keeps_graph = False
    assert count_forwards(twice, 3) == 2
    expected = weights_of(twice)
    for name, weight in weights_of(once).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4)
    kept = [
        [e["select/kept_tokens"] for e in t.state.log_history if "loss" in e] for t in (once, twice)
    ]
    assert kept[0] == kept[1]
    log = [entry for entry in once.state.log_history if "loss" in entry]
    assert all(entry["perf/reused_tokens"] == entry["perf/train_tokens"] > 0 for entry in log)
    assert not any("perf/reused_tokens" in entry for entry in twice.state.log_history)


def test_what_needs_a_forward_of_its_own_has_one(micro_lab, tmp_path):
    assert count_forwards(make_trainer(micro_lab, tmp_path / "a", max_steps=1, **SPLIT)) == 4 + 4
    again = make_trainer(micro_lab, tmp_path / "b", max_steps=2, num_iterations=2, **BATCH)
    assert count_forwards(again) == 1 + 2
    model = nn.Sequential(nn.Dropout(0.1))
    model.config = again.model.config
    assert _drops_units(model) and not _drops_units(again.model)


@pytest.mark.parametrize("batch", [BATCH, SPLIT], ids=["one", "four"])
def test_the_scoring_pass_is_the_prefix_of_the_window(micro_lab, tmp_path, batch):
    settings = {"budget": 0.2, "anchor_coef": 0.5, "gradient_window": 2, "max_steps": 3} | batch
    num = batch["gradient_accumulation_steps"]
    kept = make_trainer(micro_lab, tmp_path / "kept", **settings)
    assert count_forwards(kept, 3) == 2 * num, "scoring and the sparse pass"
    fresh = make_trainer(micro_lab, tmp_path / "fresh", prefix_memory_mib=0, **settings)
    assert count_forwards(fresh, 3) == 3 * num, "scoring, the prefix again, and the sparse pass"
    expected = weights_of(fresh)
    for name, weight in weights_of(kept).items():
        assert relative_error(weight, expected[name]) < 1e-4, name
    log = [entry for entry in kept.state.log_history if "loss" in entry]
    assert all(entry["perf/reused_tokens"] == entry["perf/train_tokens"] > 0 for entry in log)


def test_a_prefix_that_does_not_fit_is_computed_again_and_the_log_says_so(
    micro_lab, tmp_path, caplog, monkeypatch
):
    settings = {"budget": 0.2, "gradient_window": 2, "max_steps": 2} | SPLIT
    expected, _ = train_once(micro_lab, tmp_path / "a", **settings)
    trainer = make_trainer(micro_lab, tmp_path / "b", **settings)
    sizes = []
    original = trainer._student.scoring_states

    def measured(*args):
        hidden = original(*args)
        last = trainer._student._kept[-1]
        sizes.append(last.num_bytes if last is not None else None)
        # Room for two of the four micro-batches of a step.
        trainer.args.prefix_memory_mib = 2.5 * max(filter(None, sizes)) / 2**20
        return hidden

    monkeypatch.setattr(trainer._student, "scoring_states", measured)
    with caplog.at_level(logging.WARNING, logger="taopd"):
        trainer.train()
    assert sizes[0] is not None and sizes.count(None) == 4
    assert caplog.text.count("prefix_memory_mib") == 1
    wanted = weights_of(expected)
    for name, weight in weights_of(trainer).items():
        assert relative_error(weight, wanted[name]) < 1e-4, name
