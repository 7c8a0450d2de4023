"""From a study file to its arms: names, settings, and the controls that each is compared with.

Unless refused, every arm gets a random arm that differs from it by the selector alone, and a full arm with
the same loss; arms of the file that already are these controls are used as they are. With `rates`, every
arm becomes one arm per learning rate, and its controls are those of the same rate.
"""

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taopd.errors import ConfigError, require
from taopd.experiments.arm_student import split_settings
from taopd.experiments.study.file import StudyFile, numbers, within
from taopd.experiments.study.own_best import at_rate
from taopd.runs.redaction import redact_document
from taopd.selectors import check_budget
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.unread import unread

logger = logging.getLogger(__name__)

MOST_ARMS = 10_000
MOST_BYTES = 200
"""Of a name; file systems take 255, and "-seed0" is added."""
_NAME = re.compile(r"[\w.@%+,=-]+")
_SELECTOR_KEYS = {"selector", "compatibility", "normalization", "split_gamma"}
"""Settings that change which tokens are kept and nothing else; without effect on random and full."""
SELECTION_KEYS = _SELECTOR_KEYS | {
    *("budget", "min_keep", "gradient_window", "gradient_check_every"),
    *("anchor_coef", "anchor_fraction", "anchor_responses", "anchor_loss"),
    *("method", "reach_threshold"),
    *("weighting", "draw", "draw_floor", "draw_clip", "shadow_selectors"),
    *("budget_schedule", "budget_end", "budget_steps", "budget_scope"),
}
"""Settings of which tokens train and how much: plain full distillation has none of them."""
_OF_AN_EVALUATION = ("eval_strategy", "eval_on_start", "load_best_model_at_end")
"""Settings that need an evaluation set of the trainer's, which an arm has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyArm:
    """One arm of a study.

    Aligned example: name "random@5%", settings {"selector": "random", "budget": 0.05}, added True,
    controls {"full": "full", "random": None}
    """

    name: str
    settings: dict[str, Any]
    """What it changes in the study's config."""
    added: bool = False
    """Whether it is a control that the file does not name."""
    controls: dict[str, str | None]


def expand(study: StudyFile, base: Mapping[str, Any]) -> list[StudyArm]:
    """Return the arms of a study, controls included, full first.

    Args:
        base: settings that all arms share, those of the lab included.

    Raises:
        ConfigError: two arms of one name, a setting outside its range.
    """
    named: dict[str, dict[str, Any]] = {}
    entries = [(f"arms[{index}]", arm) for index, arm in enumerate(study.arms)]
    for where, entry in [*entries, *(("grid", arm) for arm in _grid(study.grid))]:
        with within(where):
            settings = numbers({k: v for k, v in entry.items() if k != "name"})
            # Also of an arm that will not use it: a list with 5 instead of 0.05 is a slip wherever it is.
            check_budget(settings.get("budget", 1.0))
        settings = {"selector": base.get("selector", TeachabilityConfig.selector)} | settings
        if settings["selector"] == "full":
            settings = {k: v for k, v in settings.items() if k not in SELECTION_KEYS - {"selector"}}
        name = str(entry.get("name") or _derived_name(settings, base))
        _check_name(name)
        if name in named:
            if "name" not in entry and named[name] == settings:
                continue  # `full` once per budget of a grid is one arm.
            raise ConfigError(f"two arms are called {name!r}: give one of them another name")
        twin = next((other for other in named if other.casefold() == name.casefold()), None)
        if twin is not None:  # one folder on a file system that does not tell them apart
            raise ConfigError(
                f"arms {twin!r} and {name!r} differ in case alone: rename one of them"
            )
        named[name] = settings
    own = set(named)
    controls = {name: _controls(name, named, study, base) for name in list(named)}
    for name in named.keys() - own:
        controls[name] = {"full": _find(named[name], "full", named, base), "random": None}
    order = sorted(named, key=lambda name: (named[name]["selector"] != "full", name not in own))
    arms = [
        StudyArm(
            name=name,
            settings=named[name],
            added=name not in own,
            controls={k: v if v != name else None for k, v in controls[name].items()},
        )
        for name in order
    ]
    if study.rates:
        arms = [_at(arm, rate) for arm in arms for rate in study.rates]
    # Those of the file first: a fault of theirs is in their controls too.
    asked = sorted(arms, key=lambda arm: arm.added)
    _say_unread(
        [(arm, check_settings({**base, **arm.settings}, f"arm {arm.name!r}")) for arm in asked]
    )
    return arms


def _say_unread(found: Sequence[tuple[StudyArm, dict[str, str]]]) -> None:
    """Warn of what an arm sets for itself and does not read, and of what all share and none reads."""
    for arm, names in found:
        for name, why in names.items():
            value = arm.settings.get(name)
            if name in arm.settings:
                logger.warning("arm %r: %s=%s has no effect: %s", arm.name, name, value, why)
    for name, why in found[0][1].items() if found else ():
        if all(name in names and name not in arm.settings for arm, names in found):
            logger.warning("config: %s has no effect on any arm: %s", name, why)


def _at(arm: StudyArm, rate: float) -> StudyArm:
    """An arm at a learning rate, its controls at the same one."""
    return replace(
        arm,
        name=at_rate(arm.name, rate),
        settings=arm.settings | {"learning_rate": rate},
        controls={kind: name and at_rate(name, rate) for kind, name in arm.controls.items()},
    )


def check_settings(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Make the configuration once, so that a value outside its range costs a second and not a queue slot.

    Returns:
        By name why an arm with these settings does not read one of them.

    Raises:
        ConfigError: names the arm.
    """
    check_steps(settings["max_steps"], where)
    secret = redact_document(dict(settings)) != {**settings}
    if secret or settings.get("push_to_hub"):
        raise ConfigError(
            f"{where}: a study writes its settings down, so none may hold a token or a password (set it in "
            "the environment), and nothing is uploaded (push_to_hub)"
        )
    if asked := [n for n in _OF_AN_EVALUATION if settings.get(n) not in (None, False, "no")]:
        raise ConfigError(
            f"{where}: drop {', '.join(asked)}: a study grades every arm by itself on its test prompts, "
            "every evaluate_every steps and at the end"
        )
    try:
        training, _ = split_settings(settings)
        # Without a device: a study may be checked where it does not run.
        config = TeachabilityConfig(
            output_dir="unused", **{**training, "use_cpu": True, "report_to": "none"}
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return unread(config)


def check_steps(steps: Any, where: str) -> None:
    """Refuse steps that are none, such as the -1 that makes an epoch of them."""
    whole = type(steps) is int and steps >= 1
    require(whole, f"{where}: max_steps", steps, "a whole number from 1 on: the steps of every arm")


def _grid(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not grid:
        return []
    columns = [value if isinstance(value, list) else [value] for value in grid.values()]
    for key, column in zip(grid, columns, strict=True):
        if not column:
            raise ConfigError(f"grid: {key} has no values")
    count = math.prod(map(len, columns))
    if count > MOST_ARMS:
        raise ConfigError(f"grid: {count:,} arms; at most {MOST_ARMS:,}")
    return [dict(zip(grid, row, strict=True)) for row in itertools.product(*columns)]


def _derived_name(settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """teachability@5%,loss=jsd: selector, budget, and what else differs from the base."""
    parts = [re.sub(r"[^\w.+-]+", "_", str(settings["selector"]))]
    if settings["selector"] != "full":
        budget = settings.get("budget", base.get("budget", TeachabilityConfig.budget))
        parts[0] += f"@{100 * budget:g}%" if isinstance(budget, int | float) else ""
    for key, value in settings.items():
        if key not in ("selector", "budget") and base.get(key) != value:
            parts.append(f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', str(value))}")
    return ",".join(parts)


def _check_name(name: str) -> None:
    if len(name.encode()) > MOST_BYTES:
        raise ConfigError(
            f"arm {name[:40]!r}...: a name is a folder and has at most {MOST_BYTES} bytes; give it a name"
        )
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"arm {name!r}: a name is a folder; use letters, digits and . @ % + , = _ - only"
        )


def _controls(
    name: str, named: dict[str, dict[str, Any]], study: StudyFile, base: Mapping[str, Any]
) -> dict[str, str | None]:
    """The two controls of an arm; adds the ones that are missing to `named`."""
    settings = named[name]
    found: dict[str, str | None] = {}
    for kind, wanted in (("full", study.full_control), ("random", study.random_control)):
        needless = kind == "random" and settings["selector"] in ("full", "random")
        control = None if needless else _find(settings, kind, named, base)
        if control is None and wanted and not needless:
            dropped = SELECTION_KEYS if kind == "full" else _SELECTOR_KEYS
            more = {k: v for k, v in settings.items() if k not in dropped}
            added = {"selector": kind} | more
            control = _derived_name(added, base)
            _check_name(control)
            if control in named:
                raise ConfigError(
                    f"the {kind} control of {name!r} would be called {control!r}, which is another "
                    f"arm; rename that one, or set {kind}_control: false"
                )
            named[control] = added
        found[kind] = control
    return found


def _find(
    settings: Mapping[str, Any], kind: str, named: Mapping[str, Any], base: Mapping[str, Any]
) -> str | None:
    """The arm of this kind that differs in nothing but what the kind makes void."""
    dropped = SELECTION_KEYS if kind == "full" else _SELECTOR_KEYS

    def rest(of: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in {**base, **of}.items() if k not in dropped}

    for name, other in named.items():
        if other["selector"] == kind and rest(other) == rest(settings):
            return name
    return None
