"""The type of a setting, for values that YAML has read: whether one fits, and its name in plain words."""

import types
import typing
from typing import Any

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping (key: value)",
    type(None): "null",
}


def type_words(hint: Any) -> str:
    """A field's type for somebody who writes YAML."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_words, arguments)))
    return _WORDS.get(kind, "text")


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
