"""The lines of a command's help page: flags, their help texts, and how both are laid out."""

import argparse
import textwrap
from collections.abc import Sequence

WIDTH = 100
"""Of a line in characters."""
_HALF, _FLAG_WIDTH = 48, 20
"""Of a flag that shares its line, and of the column of the flags."""


def layout(rows: Sequence[tuple[str, str]]) -> str:
    """Flags and their help texts as lines; two neighbors that are short share one."""
    lines: list[str] = []
    left = ""
    for flags, words in rows:
        text = f"{flags:<{_FLAG_WIDTH}}  {words}".rstrip()
        if left and len(text) <= _HALF:
            lines[-1] = f"  {left:<{_HALF}}  {text}"
            left = ""
            continue
        indent = " " * (_FLAG_WIDTH + 4)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False
        )
        left = text if len(text) <= _HALF else ""
    return "\n".join(lines)


def flags_of(action: argparse.Action) -> str:
    """`--name VALUE`, or the name of a positional argument."""
    value = str(action.metavar or ("NAME" if action.choices else action.dest.upper()))
    if action.nargs in ("+", "*"):
        value = f"{value} ..." if action.nargs == "+" else f"[{value} ...]"
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def words_of(action: argparse.Action) -> str:
    """Choices, help text, and the default in brackets."""
    choices = ", ".join(map(str, action.choices or ()))
    words = "; ".join(filter(None, (choices, action.help)))
    default = action.default
    if default is None or isinstance(default, bool) or default == []:
        return words
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{words} ({shown})"
