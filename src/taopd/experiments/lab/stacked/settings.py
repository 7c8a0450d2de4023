"""Settings of a stack: those that it follows, and the ones in which its arms may differ."""

from dataclasses import fields
from typing import Any

from taopd.errors import ConfigError
from taopd.experiments.arm_settings import Arm
from taopd.trainer.config import TeachabilityConfig

SHARED = (
    "per_device_train_batch_size",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_completion_length",
    "score_top_k",
    "anchor_loss",
)
"""Settings in which the arms of one stack must agree."""
OWN = (
    *("selector", "budget", "compatibility", "normalization", "min_keep", "split_gamma"),
    *("budget_schedule", "budget_end", "budget_steps", "budget_scope", "weighting"),
    *("draw", "draw_floor", "draw_clip", "loss", "beta", "reduction", "denominator"),
    *("ppo_clip_low", "ppo_clip_high", "method", "reach_threshold", "stop_token_ids"),
    *("anchor_coef", "anchor_fraction", "anchor_responses"),
    *("match_update_norm", "max_update_norm"),
)
"""Settings in which they may differ."""
WITHOUT_EFFECT = ("gradient_checkpointing", "logging_steps", "disable_tqdm", "log_update_norm")
"""Settings of the trainer that change nothing that a stack does."""
SAME_FILES = ("student", "teacher", "prompts", "match", "num_test_prompts")
FIXED: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
}
"""What an arm need not say. All other settings are at their defaults."""


def stack_settings(arms: list[Arm], output_dir: str) -> list[TeachabilityConfig]:
    """The settings of every arm, checked as the trainer would check them.

    Raises:
        ConfigError: for arms that do not fit together, or a setting that only the trainer follows.
    """
    settings = []
    for arm in arms:
        _refuse_of_the_trainer(arm)
        made = FIXED | arm.config | {"seed": arm.seed}
        settings.append(TeachabilityConfig(output_dir=output_dir, **made))
    for arm, args in zip(arms, settings, strict=True):
        if args.max_steps < 1:
            raise ConfigError(f"arm {arm.name!r}: a stack counts no epochs: set max_steps")
        for name in SHARED:
            if getattr(args, name) != getattr(settings[0], name):
                raise ConfigError(f"arm {arm.name!r}: one stack has one {name}")
        for name in SAME_FILES:
            if getattr(arm, name) != getattr(arms[0], name):
                raise ConfigError(f"arm {arm.name!r}: one stack has one {name}")
    return settings


def _refuse_of_the_trainer(arm: Arm) -> None:
    """Refuse what an arm sets otherwise and no stack reads; settings of an adapter have no default here."""
    usual = {entry.name: entry.default for entry in fields(TeachabilityConfig)} | FIXED
    for name, value in arm.config.items():
        if name in (*SHARED, *OWN, *WITHOUT_EFFECT) or (name in usual and value == usual[name]):
            continue
        if (name, value) == ("collapse_guard", "off"):  # a stack has none
            continue
        stays = f"; a stack has {name}={usual[name]!r}" if name in usual else ""
        raise ConfigError(f"arm {arm.name!r}: {name}={value!r} needs the trainer{stays}")
