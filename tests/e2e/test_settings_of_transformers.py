"""Settings of transformers that fail, or do nothing, only once a run trains. Oracle: TRL's trainer."""

import json

import pytest
import torch
from datasets import Dataset
from trl import DistillationTrainer

from taopd.errors import ConfigError
from taopd.models.prompts import load_prompts
from taopd.trainer.checkpoint.resume import changed_settings
from taopd.trainer.config import TeachabilityConfig
from tests.conftest import make_rows
from tests.e2e.test_trainer import make_trainer, weights_of

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def trained(micro_lab, folder, **settings):
    """After two steps on sampled completions, by SGD: an update is as large as its gradient."""
    steps = {"max_steps": 2, "learning_rate": 1.0, "optim": "sgd"}
    trainer = make_trainer(micro_lab, folder, method="published", **steps | settings)
    trainer.train()
    return trainer


# -- activation checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "layers"),
    [
        ({}, [True, True]),
        ({"use_reentrant": True}, [True, True]),
        ({"use_reentrant": False, "early_stop": False}, [True, True]),
        ({"use_reentrant": False, "every_n_layers": 2}, [True, False]),
    ],
    ids=str,
)
def test_checkpointing_stays_as_it_was_asked_for(micro_lab, tmp_path, keywords, layers):
    """TRL switches it on anew after each sampling, of every layer, and with a hook more."""
    plain = weights_of(trained(micro_lab, tmp_path / "plain"))
    asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": keywords}
    trainer = trained(micro_lab, tmp_path / "less", **asked)
    assert [each.gradient_checkpointing for each in trainer.model.model.layers] == layers
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == 1
    for name, value in weights_of(trainer).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"use_reentrantt": False}, "use_reentrantt"),
        ({"use_reentrant": False, "determinism_check": "none at all"}, "determinism_check"),
        ({"use_reentrant": True, "debug": True}, "debug"),
        ({"every_n_layers": 0}, "every_n_layers=0: must be at least 1"),
        ({"offload": "no"}, "offload='no': must be false, or true"),
        ({"offload": True}, "offload=True: must be false, or true where the run is on a GPU"),
    ],
    ids=str,
)
def test_keywords_that_checkpointing_cannot_take_are_refused(micro_lab, tmp_path, keywords, told):
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        asked = {name: True, f"{name}_kwargs": keywords}
        with pytest.raises(ConfigError, match=f"^gradient_checkpointing_kwargs.*{told}"):
            make_trainer(micro_lab, tmp_path, **asked)


def test_a_resumed_run_may_checkpoint_otherwise(tmp_path):
    """transformers writes the setting under both of its names."""

    def settings(**given):
        return TeachabilityConfig(str(tmp_path), bf16=False, use_cpu=True, **given).to_dict()

    keywords = {"use_reentrant": False}
    for now in ({"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": keywords}):
        (tmp_path / "config.json").write_text(json.dumps(settings()))
        changes = changed_settings(tmp_path, 1, settings(**now), allowed=False)
        assert len(changes[0]["settings"]) == 2


# -- worker processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["training", "evaluation"])
def test_a_stream_is_read_whatever_is_said_of_workers(micro_lab, tmp_path, streams):
    """torch refuses both settings without workers, and TRL reads a stream without them."""
    workers = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    made = make_trainer(
        micro_lab,
        tmp_path,
        eval_dataset=prompts(streams == "evaluation"),
        **{"dataloader_num_workers": 1, "max_steps": 1} | workers | EVERY_STEP,
    )
    if streams == "training":
        loaded = load_prompts(str(micro_lab.prompts), split="train")
        made = type(made)(
            *(made.model, made.teacher_model, made.args),
            *(loaded.to_iterable_dataset(), made.eval_dataset, made.processing_class),
        )
    made.train()
    assert made.state.global_step == 1 and made.state.log_history[1]["eval_loss"] > 0
    assert {name: getattr(made.args, name) for name in workers} == workers


def prompts(stream: bool):
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in make_rows(4, "test")])
    return rows.to_iterable_dataset() if stream else rows


@pytest.mark.parametrize(
    ("name", "value"),
    [("dataloader_persistent_workers", True), ("dataloader_multiprocessing_context", "spawn")],
)
def test_settings_of_workers_without_any_have_no_effect(micro_lab, tmp_path, name, value, caplog):
    with pytest.raises(ValueError, match="num_workers > 0"):
        make_trainer(micro_lab, tmp_path, DistillationTrainer, **{name: value}).train()
    trained(micro_lab, tmp_path, max_steps=1, **{name: value})
    assert f"{name}={value} has no effect without dataloader_num_workers" in caplog.text


# -- what nothing reads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unread", "read"),
    [
        ({"warmup_steps": 2}, {"lr_scheduler_type": "constant_with_warmup"}),
        (
            {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
            {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 0.1},
        ),
        ({"adam_beta1": 0.5}, {"optim": "adamw_torch"}),
        ({"adam_beta2": 0.5}, {"optim": "adamw_torch"}),
        ({"adam_epsilon": 1e-3}, {"optim": "adamw_torch_fused"}),
        ({"optim_target_modules": ["q_proj"]}, None),
        ({"fp16": True}, None),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_checkpointing": 1}),
    ],
    ids=str,
)
def test_a_setting_that_another_one_switches_off_is_said(micro_lab, tmp_path, unread, read, caplog):
    """Of schedule `constant`, SGD, and no checkpointing. Oracle: the weights of a run without it."""
    plain = trained(micro_lab, tmp_path / "plain", max_steps=3)
    assert "has no effect" not in caplog.text
    same = trained(micro_lab, tmp_path / "same", max_steps=3, **unread)
    assert all(
        torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(same).items()
    )
    (name,) = unread
    assert f"{name}={unread[name]} has no effect" in caplog.text
    caplog.clear()
    if read is not None:
        make_trainer(micro_lab, tmp_path / "read", **unread | read)
        assert "has no effect" not in caplog.text


def test_noise_and_dropout_are_of_the_training_forward_alone(micro_lab, tmp_path):
    """TRL samples with them, as the guide says."""
    modes = []
    for kind in ("ours", "TRL"):
        cls = {"TRL": {"cls": DistillationTrainer}}.get(kind, {})
        trainer = make_trainer(micro_lab, tmp_path / kind, neftune_noise_alpha=5.0, **cls)
        own = trainer.model.generate

        def spy(*args, own=own, trainer=trainer, **kwargs):
            modes.append(trainer.model.training)
            return own(*args, **kwargs)

        trainer.model.generate = spy
        trainer.train(**({"check": False} if kind == "ours" else {}))
    assert modes == [False, True]
