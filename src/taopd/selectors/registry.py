"""The selectors by name, and how to add one.

A selector is a score, which end of it is kept, and who may be chosen at all. Yours is one function:

    @register_selector("sharp")
    def sharp(view):
        return view.d * (1 - view.h)

and then `select(table, selector="sharp")`; unregistered ones are named by path,
"package.module:function".
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from taopd.errors import ConfigError, suggest
from taopd.selectors import scores
from taopd.selectors.scores import NormalizedView

Score = Callable[[NormalizedView], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """How rows are ordered and which of them are candidates."""

    name: str
    scores: Score
    """[N] scores; finite on every valid row."""
    ascending: bool = False
    """Keep the lowest scores; ties then go to the larger position. [METHOD R15]"""
    candidates: Score | None = None
    """bool [N]; None: every valid row. Fewer candidates than the budget are all kept. [R16]"""
    weighted: bool = False
    """The score, which must then be >= 0, is also the weight of a kept row, as it is: nothing
    scales the weights to a mean of one, so their size changes the step size."""
    lead: Score | None = None
    """round-half-even(gamma * n) rows are taken by this score first, the rest by `scores`."""
    reference_scores: Score | None = None
    """Used instead of `scores` under rules="reference", where the released code differs."""


SELECTORS: dict[str, Selector] = {}
"""Every registered selector by name."""

REFERENCE_NAMES = {
    "ca_softor": "teachability+entropy",
    "compatibility": "compatibility",
    "dincompat_high": "incompatible",
    "divergence": "divergence",
    "dlearn_high": "teachability",
    "entropy": "entropy",
    "full": "full",
    "q3": "q3",
    "q3_dincompat_high": "q3_incompatible_high",
    "q3_highc": "q3_high_c",
    "q3_lowc": "q3_low_c",
    "q3_teachability_high": "q3_teachability_high",
    "q3_teachability_low": "q3_teachability_low",
    "random": "random",
    "split_budget_ca": "split",
    "teachability": "teachability",
    "tip": "tip",
}
"""The released code's method names and ours. [METHOD section 3]"""


def register_selector(
    name: str,
    *,
    ascending: bool = False,
    candidates: Score | None = None,
    weighted: bool = False,
    lead: Score | None = None,
    reference_scores: Score | None = None,
) -> Callable[[Score], Score]:
    """Decorator: make a function of a `NormalizedView` selectable as `name`; options as in
    `Selector`.

    The function is returned as it was. Running the same definition again (a notebook cell) replaces
    it.

    Raises:
        ConfigError: if the name belongs to another function.
    """

    def register(function: Score) -> Score:
        known = SELECTORS.get(name)
        if known is not None and _origin(known.scores) != _origin(function):
            raise ConfigError(
                f"selector {name!r} is already {_origin(known.scores)}; "
                "register yours under another name"
            )
        SELECTORS[name] = Selector(
            name=name,
            scores=function,
            ascending=ascending,
            candidates=candidates,
            weighted=weighted,
            lead=lead,
            reference_scores=reference_scores,
        )
        return function

    return register


def _origin(function: Score) -> str:
    module = getattr(function, "__module__", "?")
    return f"{module}:{getattr(function, '__qualname__', repr(function))}"


def resolve_selector(selector: str | Score | Selector) -> Selector:
    """The `Selector` behind a registered name, a path, a function or a `Selector`.

    Paths: "package.module:function" or "package.module.function". A function that was registered
    keeps the options it was registered with.

    Raises:
        ConfigError: for an unknown name or a path that leads nowhere.
    """
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, str):
        if selector in SELECTORS:
            return SELECTORS[selector]
        if selector in REFERENCE_NAMES:
            raise ConfigError(
                f"selector {selector!r} is the released code's name; here it is "
                f"{REFERENCE_NAMES[selector]!r}"
            )
        if "." not in selector and ":" not in selector:
            raise ConfigError(f"selector {selector!r} is unknown.{suggest(selector, SELECTORS)}")
        return _from_object(_load(selector), selector)
    return _from_object(selector, getattr(selector, "__name__", type(selector).__name__))


def _load(path: str) -> object:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"selector {path!r}: cannot import {module_name!r} ({error}); "
            "is its folder on PYTHONPATH?"
        ) from error
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigError(
                f"selector {path!r}: {module_name} has no {attribute!r}.{suggest(attribute, names)}"
            )
        target = getattr(target, part)
    return target


def _from_object(target: object, name: str) -> Selector:
    if isinstance(target, Selector):
        return target
    if not callable(target):
        raise ConfigError(
            f"selector {name!r} is a {type(target).__name__}; "
            "expected a function of a NormalizedView"
        )
    for known in SELECTORS.values():
        if known.scores is target:
            return known
    return Selector(name=name, scores=target)


register_selector("teachability")(scores.teachability)
register_selector("teachability+entropy", reference_scores=scores.teachability_entropy_reference)(
    scores.teachability_entropy
)
register_selector("tip")(scores.tip)
register_selector("entropy")(scores.entropy)
register_selector("divergence")(scores.divergence)
register_selector("compatibility")(scores.compatibility)
register_selector("incompatible")(scores.incompatible)
register_selector("random")(scores.random)
register_selector("full")(scores.full)
register_selector("split", lead=scores.entropy)(scores.low_entropy_teachability)
register_selector("q3", candidates=scores.in_q3)(scores.low_entropy_teachability)
register_selector("q3_high_c", candidates=scores.in_q3)(scores.compatibility)
register_selector("q3_low_c", candidates=scores.in_q3, ascending=True)(scores.compatibility)
register_selector("q3_teachability_high", candidates=scores.in_q3)(scores.teachability)
register_selector("q3_teachability_low", candidates=scores.in_q3, ascending=True)(
    scores.teachability
)
register_selector("q3_incompatible_high", candidates=scores.in_q3)(scores.incompatible)
