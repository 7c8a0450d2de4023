"""The types of settings: a value of another type is refused by name where the config is made.

Which settings: all that a class of this package declares, and those of TRL and transformers that are numbers,
truth values, text or one of a few names. Numbers are finite. Numbers of NumPy become Python's, a tuple a
list and a `Path` text, as JSON has them. Files and flags end here too, after the parser has made numbers of
their text.
"""

import os
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from taopd.errors import ConfigError, DataError, out_of_range, require, require_known
from taopd.runs.validation import parse_json, read_text

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "None",
}
_IN_YAML = _WORDS | {float: "a number", dict: "a mapping (key: value)", type(None): "null"}

_LARGEST = 2**63
"""Beyond it there is no count and no measurement, and 64 bits overflow."""
_REWRITTEN = ("fsdp",)
"""Settings that transformers writes as another type than it declares."""
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Mappings that may stand in a JSON file."""
_NONE_IS_ZERO = ("max_grad_norm",)
"""Numbers for which older versions of transformers took None, whatever they declare."""


def check_types(config: Any, *, choices: Mapping[str, Iterable[str]]) -> None:
    """Refuse a value of a wrong type, and write every other one as the type of its setting has it."""
    hints, names, enums = _declared(config.__class__)
    choices = {**enums, **choices}
    for name in names:
        value, hint = getattr(config, name), hints[name]
        if value is None and name in _NONE_IS_ZERO:
            value = 0.0
        # Left out: it is filled in later, whatever the type says.
        if value is None and getattr(type(config), name, None) is None:
            continue
        if value is False and name in choices:
            # What YAML reads where somebody wrote no, or off.
            value = next((word for word in ("no", "off") if word in choices[name]), value)
        try:
            setattr(config, name, _as(hint, value))
        except TypeError:
            allowed = f"one of {', '.join(choices[name])}" if name in choices else _words(hint)
            raise out_of_range(name, value, allowed) from None
        except OverflowError:
            raise out_of_range(name, value, "a number below 2**63") from None
        if name in enums:
            require_known(name, getattr(value, "value", value), enums[name])
    for name, hint in hints.items():
        value = getattr(config, name)
        if name not in names and _takes_mapping(hint):
            _check_mapping(name, value)
        elif (kind := _only_class(hint)) and not isinstance(value, kind | None):
            raise out_of_range(name, value, f"a {kind.__name__}")


def _check_mapping(name: str, value: Any) -> None:
    """Refuse what is no mapping, no JSON text and, where a file may be named, no JSON file.

    What transformers has made of a mapping is an object of its own, and stays.
    """
    if isinstance(value, int | float | bytes | list | tuple | set):
        raise out_of_range(name, value, "a mapping")
    if not isinstance(value, str):
        return
    inline = value.lstrip().startswith("{")
    if not inline and name in _FILES and not Path(value).is_file():
        raise ConfigError(f"{name}={value!r}: no such file")
    try:
        held = parse_json(value if inline or name not in _FILES else read_text(Path(value)), name)
    except DataError as error:
        raise ConfigError(f"{name}={value!r}: must be a mapping; {error}") from error
    require(isinstance(held, dict), name, value, "a mapping")


@cache
def _declared(kind: type) -> tuple[dict[str, Any], tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The types of all settings, the names of those that are looked at, and what transformers' enums hold."""
    hints = typing.get_type_hints(kind)
    own = [
        base
        for base in kind.__mro__
        if base.__module__.partition(".")[0] == __name__.partition(".")[0]
    ]
    names = [
        name for base in own for name in vars(base).get("__annotations__", {}) if name in hints
    ]
    enums = {name: found for name, hint in hints.items() if (found := _members(hint))}
    plain = [name for name, hint in hints.items() if _is_plain(hint) and name not in _REWRITTEN]
    return hints, tuple(dict.fromkeys([*names, *plain, *enums])), enums


def _members(hint: Any) -> tuple[str, ...]:
    kinds = [kind for kind in typing.get_args(hint) if isinstance(kind, type)]
    return tuple(str(each.value) for kind in kinds if issubclass(kind, Enum) for each in kind)


def _only_class(hint: Any) -> type | None:
    """The class of which a setting takes objects, and nothing else but None."""
    inside = [each for each in typing.get_args(hint) if each is not type(None)]
    one = len(inside) == 1 and isinstance(inside[0], type)
    return inside[0] if one and inside[0] not in _WORDS and not _members(hint) else None


def _takes_mapping(hint: Any) -> bool:
    return dict in (typing.get_origin(each) or each for each in (hint, *typing.get_args(hint)))


def _is_plain(hint: Any) -> bool:
    """Whether numbers, truth values and text, or lists of them, are all that a type allows."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType, list):
        return all(map(_is_plain, inside))
    return kind in (bool, int, float, str, type(None))


def _as(hint: Any, value: Any) -> Any:
    """The value as this type has it; TypeError: it is none. OverflowError: a number too large for any."""
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
    if kind is bool and type(value) is int and value in (0, 1):
        return bool(value)
    # First, because True is an int in Python.
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError
    if kind in (int, float) and isinstance(value, Integral if kind is int else Real):
        number: Any = value
        if not abs(number) < inf:
            raise TypeError
        if abs(number) >= _LARGEST:
            raise OverflowError
        return number if isinstance(number, int | float) else kind(number)
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


# -- what YAML has read, before a parser has seen it --------------------------------------------------


def type_words(hint: Any) -> str:
    """A field's type for somebody who writes YAML."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_words, arguments)))
    return _IN_YAML.get(kind, "text")


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can become a field of this type; argparse converts text itself."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    # First, because True is an int in Python.
    if isinstance(value, bool):
        return kind in (bool, str, Any)
    # argparse converts text to the field's type, and reports what it cannot convert.
    if isinstance(value, str):
        return kind not in (dict, type(None))
    if not isinstance(kind, type):
        return True
    if kind is bool:
        return value in (0, 1)
    if kind in (list, dict, int, float, type(None)):
        return isinstance(value, (int, float) if kind is float else kind)
    return not isinstance(value, (list, dict, type(None)))
