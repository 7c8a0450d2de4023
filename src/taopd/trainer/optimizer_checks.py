"""Ranges of the optimizer's settings, which torch refuses only when the models are loaded.

torch says what is wrong and not which setting it is; a NaN passes some of its comparisons.
"""

from math import isfinite
from typing import Any

from taopd.errors import require

NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon")
BELOW_ONE = ("adam_beta1", "adam_beta2")


def check_optimizer(config: Any) -> None:
    """Refuse a number that no optimizer takes.

    Raises:
        ConfigError: names the setting and the range.
    """
    for name in (*NOT_NEGATIVE, *BELOW_ONE):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if name in BELOW_ONE:
            require(number and 0 <= value < 1, name, value, "from 0 to less than 1")
        else:
            require(number and value >= 0, name, value, "a finite number, at least 0")
