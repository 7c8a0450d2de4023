"""Ranges of settings of transformers, which are refused only when the models are loaded, or never.

torch says what is wrong and not which setting it is; a NaN passes some of its comparisons. transformers does
one step for `max_steps=0`, and takes a negative interval for its size.
"""

from collections.abc import Callable
from math import isfinite, isnan
from typing import Any

from taopd.errors import ConfigError, out_of_range, require

NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon")
BELOW_ONE = ("adam_beta1", "adam_beta2")
FROM_ZERO = (
    *("seed", "data_seed", "dataloader_num_workers"),
    *("logging_steps", "save_steps", "eval_steps"),
)
"""Smallest value 0; None is allowed."""
SAMPLING: dict[str, tuple[str, Callable[[float], bool]]] = {
    "top_p": ("above 0, at most 1", lambda value: 0 < value <= 1),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "top_k": ("at least 0; 0 keeps every token", lambda value: value >= 0),
    "repetition_penalty": ("above 0; 1 is none", lambda value: value > 0),
}
"""Of the sampler, which passes over some of what lies outside; None is allowed."""


def check_numbers(config: Any) -> None:
    """Refuse a number that no optimizer takes, lengths that mean no run, and a NaN in any setting.

    Raises:
        ConfigError: names the setting and the range.
    """
    _check_run(config)
    for name in (*NOT_NEGATIVE, *BELOW_ONE):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if name in BELOW_ONE:
            require(number and 0 <= value < 1, name, value, "from 0 to less than 1")
        else:
            require(number and value >= 0, name, value, "a finite number, at least 0")


def _check_run(config: Any) -> None:
    steps, epochs = config.max_steps, config.num_train_epochs
    length = "at least 1, or -1: what num_train_epochs give"
    require(steps >= 1 or steps == -1, "max_steps", steps, length)
    require(steps > 0 or epochs > 0, "num_train_epochs", epochs, "above 0, or max_steps is set")
    for name in FROM_ZERO:
        value = getattr(config, name)
        require(value is None or value >= 0, name, value, "at least 0")
    for name, (words, fits) in SAMPLING.items():
        value = getattr(config, name)
        require(value is None or fits(value), name, value, words)
    for name, value in vars(config).items():
        if isinstance(value, float) and isnan(value):
            raise out_of_range(name, value, "a number")


def worded(error: ValueError) -> ValueError:
    """The refusal of bfloat16 where there is no GPU, with what a CPU takes; any other one as it is."""
    if "bf16/gpu" not in str(error):
        return error
    return ConfigError(
        "there is no GPU here that computes in bfloat16: for a run on the CPU set use_cpu=True, bf16=False "
        "and gradient_checkpointing=False"
    )
