"""The types of our settings: a value of another type is refused by name where the config is made.

Which settings: all that a class of this package declares, and those of TRL's whose range it checks. Numbers
are finite. Numbers of NumPy become Python's, a tuple a list and a `Path` text, as JSON has them. Files and
flags end here too, after the parser has made numbers of their text.
"""

import os
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from math import isfinite
from numbers import Integral, Real
from typing import Any

from taopd.errors import out_of_range

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "None",
}


def check_types(
    config: Any, *, more: Iterable[str] = (), choices: Mapping[str, Iterable[str]]
) -> None:
    """Refuse a value of a wrong type, and write every other one as the type of its setting has it.

    Args:
        more: settings of other packages that are looked at too.
        choices: the allowed values of some settings, to be named.

    Raises:
        ConfigError: names the setting, the value and what is allowed.
    """
    hints, own = _declared(config.__class__)
    for name in (*own, *more):
        value, hint = getattr(config, name), hints[name]
        # Left out: it is filled in later, whatever the type says.
        if value is None and getattr(type(config), name, None) is None:
            continue
        try:
            setattr(config, name, _as(hint, value))
        except TypeError:
            allowed = f"one of {', '.join(choices[name])}" if name in choices else _words(hint)
            raise out_of_range(name, value, allowed) from None


@cache
def _declared(kind: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The types of all settings, and the names of those that this package declares."""
    hints = typing.get_type_hints(kind)
    own = [
        base
        for base in kind.__mro__
        if base.__module__.partition(".")[0] == __name__.partition(".")[0]
    ]
    names = [
        name for base in own for name in vars(base).get("__annotations__", {}) if name in hints
    ]
    return hints, tuple(dict.fromkeys(names))


def _as(hint: Any, value: Any) -> Any:
    """The value as this type has it; TypeError: it is none."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for each in inside:
            try:
                return _as(each, value)
            except TypeError:
                continue
        raise TypeError
    if kind is list and isinstance(value, list | tuple):
        return [_as(inside[0] if inside else Any, each) for each in value]
    # First, because True is an int in Python.
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, Integral):
        return value if isinstance(value, int) else int(value)
    if kind is float and isinstance(value, Real) and isfinite(value):
        return value if isinstance(value, int | float) else float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in _WORDS and (kind in (int, float) or not isinstance(value, kind)):
        raise TypeError
    return value


def _words(hint: Any) -> str:
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, inside)))
    if kind is list and inside:
        return f"a list of {({str: 'texts', int: 'whole numbers'}).get(inside[0], 'values')}"
    return _WORDS.get(kind, "another type")
