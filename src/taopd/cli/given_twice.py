"""A flag that is given twice: refused, because argparse takes the last one without a word.

Flags that collect (`action="append"`) may be repeated, and a switch that is on stays on.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

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
            parser.error(given_twice(flag, several=several))


def given_twice(flag: str, *, several: bool = False) -> str:
    """What to say of it."""
    values = ", with all of its values after it" if several else ""
    return f"{flag} is given twice: give it once{values}"
