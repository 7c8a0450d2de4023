"""The settings of optimizer and schedule, looked at before a run folder is claimed."""

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler

from taopd.errors import ConfigError
from taopd.trainer.settings.number_checks import about

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)

_UNSAVABLE = ("grokadamw",)
"""They keep moments by the parameter itself, outside of torch's state: no checkpoint can be loaded again."""
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_KEYWORDS = ("constant", "constant_with_warmup")
"""Schedules for which transformers passes over `warmup_steps`, and over `lr_scheduler_kwargs`."""
_OF_SOME = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")
"""Settings that some optimizers read."""
_NOBODYS = "neither-name-nor-number"


def check_optim(args: "TeachabilityConfig", model: nn.Module) -> None:
    """Refuse an optimizer that cannot be made or saved, and arguments of it that it does not read."""
    asked = copy.copy(args)
    name = str(getattr(args.optim, "value", args.optim))
    # The layer-wise ones hang hooks on the weights as soon as they are asked for.
    asked.optim = type(args.optim)(name.removesuffix("_layerwise"))
    with about(args, "optim", "optim_args", "optim_target_modules"):
        found = _keywords(asked, model)
    for setting in _OF_SOME:
        other, default = copy.copy(asked), getattr(TrainingArguments, setting)
        setattr(other, setting, default)
        value = getattr(args, setting)
        if value != default and _made_alike(other, model, found):
            logger.warning("%s=%s has no effect: %s does not read it", setting, value, name)
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
    """Refuse a schedule that cannot be made; say which settings of it this one does not read."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.warmup_steps and name in _WITHOUT_WARMUP:
        how = ": constant_with_warmup has one" if name == "constant" else ""
        logger.warning(
            "warmup_steps=%s has no effect: lr_scheduler_type=%r has no warmup%s",
            *(args.warmup_steps, name, how),
        )
    if args.lr_scheduler_kwargs and name in _WITHOUT_KEYWORDS:
        given = args.lr_scheduler_kwargs
        logger.warning("lr_scheduler_kwargs=%s has no effect: %r reads none", given, name)
    # With epochs their number is not known yet, and no schedule is refused for it.
    steps = args.max_steps if args.max_steps > 0 else 1000
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    with about(args, "lr_scheduler_type", "lr_scheduler_kwargs"):
        make_schedule(args, optimizer, steps)


def make_schedule(
    args: "TeachabilityConfig", optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler:
    """The learning rate's schedule over this many steps, as transformers makes it."""
    return get_scheduler(
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
    return not _made_alike(asked, model, without)


def _made_alike(asked: Any, model: nn.Module, found: Any) -> bool:
    """Whether an optimizer can be made of these settings, and with the same keywords."""
    try:
        return _keywords(asked, model) == found
    except (AttributeError, TypeError, ValueError):
        return False


def _keywords(asked: Any, model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What transformers makes the optimizer with, and of groups of parameters what is set for each."""
    keywords = dict(Trainer.get_optimizer_cls_and_kwargs(asked, model)[1])
    groups = keywords.pop("params", [])
    return keywords, [{k: v for k, v in group.items() if k != "params"} for group in groups]
