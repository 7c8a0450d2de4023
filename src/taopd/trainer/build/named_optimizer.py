"""The settings of optimizer and schedule, looked at before a run folder is claimed."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from taopd.errors import ConfigError
from taopd.trainer.settings.number_checks import about

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

_UNSAVABLE = ("grokadamw",)
"""They keep moments by the parameter itself, outside of torch's state: no checkpoint can be loaded again."""
_NOBODYS = "neither-name-nor-number"


def check_optim(args: "TeachabilityConfig", model: nn.Module) -> None:
    """Refuse an optimizer that cannot be made or saved, and arguments of it that it does not read.

    Raises:
        ConfigError: names the setting. ImportError: a package is missing.
    """
    asked = copy.copy(args)
    name = str(getattr(args.optim, "value", args.optim))
    # The layer-wise ones hang hooks on the weights as soon as they are asked for.
    asked.optim = type(args.optim)(name.removesuffix("_layerwise"))
    with about(args, "optim", "optim_args", "optim_target_modules"):
        _keywords(asked, model)
    if name in _UNSAVABLE and args.save_strategy != "no":
        raise ConfigError(
            f"optim={name!r} keeps its state where no checkpoint can hold it: take another optimizer, or "
            "save_strategy='no' for a run that cannot be resumed"
        )
    given = [part for part in str(args.optim_args or "").replace(" ", "").split(",") if part]
    for part in given:
        others = [each for each in given if each != part]
        if not _reads(asked, model, part.partition("=")[0], others):
            raise ConfigError(
                f"optim_args={args.optim_args!r}: {name} does not read {part.partition('=')[0]!r}, it would "
                "have no effect; learning_rate, weight_decay, adam_beta1, adam_beta2 and adam_epsilon are "
                "settings of their own"
            )


def check_schedule(args: "TeachabilityConfig") -> None:
    """Refuse a schedule that cannot be made."""
    # With epochs their number is not known yet, and no schedule is refused for it.
    steps = args.max_steps if args.max_steps > 0 else 1000
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    with about(args, "lr_scheduler_type", "lr_scheduler_kwargs"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


def _reads(asked: Any, model: nn.Module, key: str, others: list[str]) -> bool:
    """Whether an argument changes what the optimizer is made with: a value of no kind is refused, or kept."""
    asked.optim_args = ",".join(others)
    without = _keywords(asked, model)
    asked.optim_args = ",".join([*others, f"{key}={_NOBODYS}"])
    try:
        return _keywords(asked, model) != without
    except (AttributeError, TypeError, ValueError):
        return True


def _keywords(asked: Any, model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What transformers makes the optimizer with, and of groups of parameters what is set for each."""
    keywords = dict(Trainer.get_optimizer_cls_and_kwargs(asked, model)[1])
    groups = keywords.pop("params", [])
    return keywords, [{k: v for k, v in group.items() if k != "params"} for group in groups]
