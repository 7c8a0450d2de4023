"""Settings are checked when they are made, with the nearest name and the range."""

import warnings

import pytest

from taopd.errors import ConfigError
from taopd.experiments.study.file import parse_study_file
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.config_checks import REMOVED
from taopd.trainer.settings_file import parse_settings


def config(**settings):
    return TeachabilityConfig(output_dir="unused", bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selector": "teachabilty"}, "Did you mean 'teachability'"),
        ({"selector": "no.such.module:score"}, "no.such.module"),
        ({"loss": "reverse_k"}, "Did you mean 'reverse_kl'"),
        ({"signals": "top"}, "signals='top' is unknown"),
        ({"compatibility": "mas"}, "Did you mean 'mass'"),
        ({"normalization": "zscore"}, "Known: minmax, none, quantile"),
        ({"reduction": "mean"}, "token_mean"),
        ({"denominator": "all"}, "selected"),
        ({"budget": 0.0}, r"budget=0.0: must be in \(0, 1\]"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"score_top_k": 0}, "score_top_k=0: must be at least 1"),
        ({"min_keep": -1}, "min_keep=-1"),
        ({"split_gamma": 1.1}, "split_gamma=1.1"),
        ({"anchor_coef": -1.0}, "anchor_coef=-1.0"),
        ({"anchor_fraction": 0.0}, "anchor_fraction=0.0"),
        ({"num_generations": 0}, "num_generations=0: must be at least 1"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be a whole number from 0 to"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1: must be at least 0"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0: must be above 0, or max_steps is set"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1, or -1: what num_train_epochs give"),
        ({"max_steps": -5}, "max_steps=-5: must be at least 1"),
        (
            {"logging_steps": -1},
            "logging_steps=-1: must be a whole number from 1 on, or a share of the run below 1",
        ),
        (
            {"save_steps": -3},
            "save_steps=-3: must be a whole number from 1 on, or a share of the run below 1",
        ),
        ({"eval_steps": -3}, "eval_steps=-3: must be at least 0"),
        ({"top_p": 3.0}, "top_p=3.0: must be above 0, at most 1"),
        ({"top_k": -1}, "top_k=-1: must be at least 0"),
        ({"min_p": 2.0}, "min_p=2.0: must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: must be a finite number"),
        ({"gradient_window": -1}, "gradient_window=-1: must be none, or 0 or more positions"),
        (
            {"gradient_window": 0, "neftune_noise_alpha": 5.0},
            "gradient_window and neftune_noise_alpha: .* leave one of them out",
        ),
        ({"gradient_check_every": -1}, "gradient_check_every=-1"),
        ({"gradient_check_every": 5}, "set gradient_window"),
        (
            {
                "gradient_window": 4,
                "gradient_check_every": 5,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "reentrant checkpointing",
        ),
        (
            {
                "gradient_window": 4,
                "gradient_check_every": 5,
                "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
            },
            "reentrant checkpointing",
        ),
        (
            {
                "teacher_quantization": "8bit",
                "teacher_model_init_kwargs": '{"quantization_config": {"load_in_4bit": true}}',
            },
            "teacher_quantization and a quantization_config",
        ),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"loss": "jsd", "beta": 1.0}, "strictly between 0 and 1"),
        ({"loss": "reverse_kl", "beta": 0.5}, "choose loss='reverse_kl'"),
    ],
)
def test_bad_settings_say_what_to_do(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_machine_without_a_gpu_is_told_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        ConfigError, match="set use_cpu=True, bf16=False and gradient_checkpointing"
    ):
        TeachabilityConfig(output_dir=str(tmp_path))
    TeachabilityConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False)


@pytest.mark.parametrize(("loss", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("jsd", 0.5)])
def test_beta_follows_from_the_loss(loss, beta):
    assert config(loss=loss).beta == beta
    assert config(loss=loss, beta=beta).beta == beta


def test_defaults_are_the_published_budget_and_loss_with_the_rule_of_reach():
    made = config()
    assert (made.selector, made.budget, made.score_top_k) == ("teachability", 0.1, 16)
    assert (made.signals, made.loss, made.reduction) == ("exact", "reverse_kl", "token_mean")
    assert (made.min_keep, made.num_generations) == (0, 1)
    assert (made.method, made.anchor_coef, made.collapse_guard) == ("reach", 3.0, "warn")
    assert (made.anchor_fraction, made.anchor_responses) == (0.1, 1.0)
    assert made.compatibility == "reach"
    made = config(method="anchored")
    assert (made.anchor_coef, made.anchor_fraction, made.anchor_responses) == (1.0, 0.05, 0.25)
    assert config(method="published").anchor_coef == 0.0
    assert config(method="published", anchor_coef=0.5).anchor_coef == 0.5
    assert (made.gradient_window, made.gradient_check_every) == (None, 0)


@pytest.mark.parametrize(
    "settings",
    [{"selector": "random"}, {"selector": "divergence"}, {"reduction": "sample_mean"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_what_reach_is_no_rule_for_is_anchored(settings):
    """No token is taken from a selector that the user names, and no default is refused."""
    made = config(**settings)
    assert (made.method, made.anchor_coef, made.compatibility) == ("anchored", 1.0, "mass")


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_says_what_to_use_instead_wherever_it_is_set(name, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 0.5\n")
    study = {"lab": "dialect", "seeds": [0], "arms": [{"selector": "full"}], "config": {name: 0.5}}
    for set_it in (
        lambda: config(**{name: 0.5}),
        lambda: parse_settings(str(file), []),
        lambda: parse_settings(None, [f"--{name.replace('_', '-')}", "0.5"]),
        lambda: parse_settings(None, [f"--{name}=0.5"]),
        lambda: parse_study_file(study),
    ):
        with pytest.raises(ConfigError, match=f"^{name} was removed from taopd: .*; leave it out"):
            set_it()


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": False}], ids=["default", "guide"]
)
def test_no_library_warns_of_what_the_guide_recommends(settings, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = TeachabilityConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    assert made.gradient_checkpointing is settings.get("gradient_checkpointing", True)
