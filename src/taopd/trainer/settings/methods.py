"""The methods, and the settings that each one stands for unless they are given.

The default is `reach` where it is defined: it is a rule for the selector `teachability` with the reduction
`token_mean`. Any other selector is a choice of the user's which tokens train: it is held by the anchor, and
no token is taken from it. How the default was chosen: docs/results/default.md.
"""

from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError
from taopd.trainer.settings.filled import filled

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
    # On fewer completions what the initial student would say in the others is remembered: not yet the
    # default, as most of what was measured is from before it could be.
    "reach": {
        "anchor_coef": 3.0,
        "anchor_fraction": 0.1,
        "anchor_responses": 1.0,
        "compatibility": "reach",
    },
}
"""By the name of the method; `published` draws only for the guard, or with an `anchor_coef` of the user's."""


def fill_in(config: Any) -> None:
    """Give the settings that were left out the values of the method; an unknown one changes nothing."""
    if config.method is None:
        rule = config.selector == "teachability" and config.reduction == "token_mean"
        config.method = filled("reach" if rule else "anchored")
    # With nothing left to hold or to judge, no method needs more of the initial student than anchored.
    method = "anchored" if config.method == "reach" and not judges(config) else config.method
    for name, value in METHODS.get(method, _PUBLISHED).items():
        if getattr(config, name) is not None:
            continue
        # They must hold the tokens that the user asked for.
        least = config.anchor_fraction if name == "anchor_responses" else value
        setattr(config, name, filled(max(value, least)))


def judges(config: Any) -> bool:
    """Whether the rule of `reach` decides: not where every token is asked for, which no method cuts down."""
    return running(config) == "reach"


def running(config: Any) -> str:
    """The method that decides, for what is said of a run; "full" where every token is asked for."""
    whole = config.budget == 1.0 and config.budget_schedule == "constant"
    return "full" if whole or config.selector == "full" else str(config.method)


def orders(config: Any) -> bool:
    """Whether the rule of `reach` orders the tokens, and not the score of the selector."""
    return judges(config) and (config.selector, config.compatibility) == ("teachability", "reach")


def check_method(config: "TeachabilityConfig") -> None:
    """Refuse what has no meaning under the method."""
    if judges(config) and config.reduction != "token_mean":
        raise ConfigError(
            f"method: reach divides by the budget of the whole batch, which reduction={config.reduction!r} "
            "does not have: set reduction='token_mean'"
        )
    reads_ends = config.stop_tokens != "train" or "reach" in (config.method, config.compatibility)
    if config.stop_token_ids is not None and not reads_ends:
        raise ConfigError(
            "stop_token_ids has no effect with stop_tokens='train', unless reach is read: set "
            "stop_tokens='exclude' or 'merge', or method='reach'"
        )
