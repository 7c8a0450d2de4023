"""Settings of a stack: the options in which its arms may differ, checked before loading."""

from typing import Any

from taopd.errors import ConfigError
from taopd.experiments.arm_settings import Arm
from taopd.trainer.config import TeachabilityConfig

FIXED: dict[str, Any] = {
    "gradient_window": None,
    "gradient_accumulation_steps": 1,
    "num_generations": 1,
    "num_iterations": 1,
    "weight_decay": 0.0,
    "temperature": 1.0,
    "signals": "exact",
    "stop_tokens": "train",
}
"""What every arm of a stack must be set to."""
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
SAME_FILES = ("student", "teacher", "prompts", "match", "num_test_prompts")


def stack_settings(arms: list[Arm], output_dir: str) -> list[TeachabilityConfig]:
    """The settings of every arm, checked as the trainer would check them.

    Raises:
        ConfigError: for arms that do not fit together, or a setting that only the trainer follows.
    """
    fixed: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    settings = [
        TeachabilityConfig(output_dir=output_dir, seed=arm.seed, **fixed, **arm.config)
        for arm in arms
    ]
    for arm, args in zip(arms, settings, strict=True):
        for name, value in FIXED.items():
            if getattr(args, name) != value:
                raise ConfigError(
                    f"arm {arm.name!r}: {name}={getattr(args, name)!r} needs the trainer; a stack "
                    f"has {name}={value!r}"
                )
        for name in SHARED:
            if getattr(args, name) != getattr(settings[0], name):
                raise ConfigError(f"arm {arm.name!r}: one stack has one {name}")
        for name in SAME_FILES:
            if getattr(arm, name) != getattr(arms[0], name):
                raise ConfigError(f"arm {arm.name!r}: one stack has one {name}")
    return settings
