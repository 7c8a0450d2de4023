"""The methods, and the settings that each one stands for unless they are given."""

from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

_PUBLISHED: dict[str, Any] = {
    "anchor_coef": 0.0,
    "anchor_fraction": 0.05,
    "anchor_responses": 0.25,
    "compatibility": "mass",
}
METHODS: dict[str, dict[str, Any]] = {
    "anchored": _PUBLISHED | {"anchor_coef": 1.0},
    "published": _PUBLISHED,
    # The initial student is run on all completions in any case: the hold is drawn from all of them.
    "reach": {
        "anchor_coef": 3.0,
        "anchor_fraction": 0.1,
        "anchor_responses": 1.0,
        "compatibility": "reach",
    },
}
"""By the name of the method; `published` draws only for the guard, or with an `anchor_coef` of the user's."""


def fill_in(config: "TeachabilityConfig") -> None:
    """Give the settings that were left out the values of the method; an unknown one changes nothing."""
    for name, value in METHODS.get(config.method, _PUBLISHED).items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def check_method(config: "TeachabilityConfig") -> None:
    """Refuse what has no meaning under the method.

    Raises:
        ConfigError: names the setting.
    """
    if config.method == "reach" and config.reduction != "token_mean":
        raise ConfigError(
            f"method: reach divides by the budget of the whole batch, which reduction={config.reduction!r} "
            "does not have: set reduction='token_mean'"
        )
