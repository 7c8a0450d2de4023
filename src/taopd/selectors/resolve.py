"""From what a user writes to a `Selector`: a registered name, an expression, a path, a function."""

import importlib
import traceback

from taopd.errors import ConfigError, suggest
from taopd.selectors.expressions import is_expression, parse_expression
from taopd.selectors.registry import REFERENCE_NAMES, SELECTORS, Score, Selector


def resolve_selector(selector: str | Score | Selector) -> Selector:
    """The `Selector` behind a registered name, an expression, a path, a function or a `Selector`.

    A registered name wins ("teachability+entropy" is eq. 16, not a sum). Expressions: see
    `taopd.selectors.expressions`. Paths: "package.module:function" or "package.module.function". A
    function that was registered keeps the options it was registered with.

    Raises:
        ConfigError: for an unknown name or a path that leads nowhere.
    """
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, str):
        # Before expressions: "teachability+entropy" is a name of the paper's, not a sum.
        if selector in SELECTORS:
            return SELECTORS[selector]
        if selector in REFERENCE_NAMES:
            raise ConfigError(
                f"selector {selector!r} is the released code's name; here it is "
                f"{REFERENCE_NAMES[selector]!r}"
            )
        if is_expression(selector):
            return parse_expression(selector)
        if "." not in selector and ":" not in selector:
            raise ConfigError(f"selector {selector!r} is unknown.{suggest(selector, SELECTORS)}")
        return _from_object(load_object(selector, "selector"), selector)
    return _from_object(selector, getattr(selector, "__name__", type(selector).__name__))


def load_object(path: str, setting: str) -> object:
    """What a dotted path names, "package.module:name" or "package.module.name".

    Args:
        setting: whose value the path is, for messages.

    Raises:
        ConfigError: it leads nowhere.
    """
    # Without a colon the last dot parts module and function.
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    # Code of the user's own, named in a config as it would be imported in Python.
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{setting} {path!r}: cannot import {module_name!r} ({error}); "
            "is its folder on PYTHONPATH?"
        ) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{setting} {path!r}: importing {module_name!r} raised {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigError(
                f"{setting} {path!r}: {module_name} has no {attribute!r}.{suggest(attribute, names)}"
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
    # Given as a function, a registered selector keeps its candidates and its order.
    for known in SELECTORS.values():
        if known.scores is target:
            return known
    return Selector(name=name, scores=target)
