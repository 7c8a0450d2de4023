"""What is given twice: a flag, of which argparse takes the last one without a word, or one of several values.

Flags that collect (`action="append"`) may be repeated, with other values, and a switch that is on stays on.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from taopd.runs.paths import refuse_twice

_COLLECT = (argparse._AppendAction, argparse._ExtendAction, argparse._CountAction)


def refuse_given_twice(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Let the parser refuse a flag of its own that has a value and stands twice in these arguments."""
    found = {
        flag: action
        for action in parser._actions
        for flag in action.option_strings
        if action.nargs != 0 and not isinstance(action, _COLLECT)
    }
    # No value of a flag begins with a dash, so that each such word is a flag.
    typed = [word.partition("=")[0] for word in words if word.startswith("-")]
    times = Counter(found[flag].dest for flag in typed if flag in found)
    for flag in typed:
        if flag in found and times[found[flag].dest] > 1:
            several = found[flag].nargs in ("+", "*")
            values = ", with all of its values after it" if several else ""
            parser.error(f"{flag} is given twice: give it once{values}")


def refuse_values_twice(parser: argparse.ArgumentParser, found: Any) -> None:
    """Refuse a value that stands twice among those of one flag or argument, however it is written."""
    for action in parser._actions:
        values = getattr(found, action.dest, None)
        if isinstance(values, list) and values is not action.default:
            flag = action.option_strings[-1:]
            refuse_twice([str(value) for value in values], *(f"{name} " for name in flag))
