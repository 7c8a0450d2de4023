"""Settings of our own that nothing reads because of another one: said, as those of TRL are."""

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from taopd.losses import needs_teacher_distribution
from taopd.selectors import resolve_selector, resolve_weighting
from taopd.trainer.settings.filled import is_filled
from taopd.trainer.settings.methods import judges, running

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)

_OF_CLIP = ("ppo_clip_low", "ppo_clip_high")
_OF_SERVERS = ("teacher_server", "teacher_concurrency", "teacher_timeout_s", "teacher_patience_s")


def say_unread(config: "TeachabilityConfig") -> None:
    """Warn of each setting that somebody gave and nothing reads."""
    for name, why in unread(config).items():
        logger.warning("%s=%s has no effect: %s", name, getattr(config, name), why)


def unread(config: "TeachabilityConfig") -> dict[str, str]:
    """By name why nothing reads a setting that somebody gave."""
    default = {entry.name: entry.default for entry in fields(config)}
    found = {name: why for why, names in _unread(config) for name in names}
    values = {name: getattr(config, name) for name in found}
    return {
        name: why
        for name, why in found.items()
        if values[name] != default[name] and not is_filled(values[name])
    }


def _unread(config: "TeachabilityConfig") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Reasons, and the settings that nothing reads for it."""
    if config.budget_schedule == "constant":
        yield "budget_schedule is constant", ("budget_steps",)
    if config.draw == "top":
        yield "draw is top", ("draw_floor", "draw_clip")
    if config.gradient_window is None:
        yield "gradient_window is not set", ("prefix_memory_mib",)
    if needs_teacher_distribution(config.loss):
        yield f"loss {config.loss} has no ratio to the policy that sampled", _OF_CLIP
    elif config.num_iterations == 1:
        yield "num_iterations is 1, where the ratio is 1", _OF_CLIP
    yield from _unread_by_selectors(config)
    yield from _unread_holds(config)
    yield from _unread_of_teachers(config)


def _unread_by_selectors(config: "TeachabilityConfig") -> Iterator[tuple[str, tuple[str, ...]]]:
    chosen = [
        resolve_selector(name) for name in (config.selector, *(config.shadow_selectors or ()))
    ]
    if all(selector.lead is None for selector in chosen):
        yield "no selector is split", ("split_gamma",)
    weight = resolve_weighting(config.weighting)
    scores = chosen if weight is None else [*chosen, weight]
    reads = any("reach" in score.needs for score in scores)
    if not (reads or judges(config) or config.compatibility == "reach"):
        yield (
            f"method {config.method} does not ask for reach, taopd check alone does",
            ("reach_threshold",),
        )


def _unread_holds(config: "TeachabilityConfig") -> Iterator[tuple[str, tuple[str, ...]]]:
    guarded, whole = config.collapse_guard != "off", running(config) == "full"
    if not guarded:
        yield "collapse_guard is off", ("guard_every",)
    # Without a hold the guard looks at the tokens that it would draw.
    drawn = () if guarded else ("anchor_fraction", "anchor_responses")
    if whole:
        yield "every token trains, none is held", ("anchor_coef", "anchor_loss", *drawn)
    elif not judges(config) and not config.anchor_coef:
        yield "anchor_coef is 0", ("anchor_loss", *drawn)


def _unread_of_teachers(config: "TeachabilityConfig") -> Iterator[tuple[str, tuple[str, ...]]]:
    own, several = config.teacher_model_name_or_path, config.teachers
    # It may be given to the trainer instead, or as text that is not read yet.
    if own is None and not isinstance(several, dict) and config.teacher_url is None:
        return
    if own != "self_ema":
        yield "the teacher is not self_ema", ("teacher_ema_decay",)
    entries = several.values() if isinstance(several, dict) else ()
    if config.teacher_url is None and not any("url" in entry for entry in entries):
        yield "no teacher is behind an address", _OF_SERVERS
