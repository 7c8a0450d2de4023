"""Values of settings that nobody gave, such as the method's: each carries a mark that it was filled in.

Why a mark on the value itself: `dataclasses.replace` makes a config of another one's values and of nothing
else. Unmarked, what was filled in for the old selector would pass for the user's own with the new one.
The mark survives copies and pickles. `to_dict` gives plain values: a file holds a run as it was.
"""

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any


class FilledText(str):
    """Text that was filled in."""

    __slots__ = ()


class FilledNumber(float):
    """A number that was filled in."""

    __slots__ = ()


def filled(value: str | float) -> str | float:
    """The value with the mark.

    Example:
        >>> filled(0.05), is_filled(filled(0.05)), is_filled(0.05)
        (0.05, True, False)
    """
    return FilledText(value) if isinstance(value, str) else FilledNumber(value)


def is_filled(value: Any) -> bool:
    """Whether nobody gave this value."""
    return isinstance(value, FilledText | FilledNumber)


def given_otherwise(settings: Any, given: Collection[str]) -> dict[str, Any]:
    """The settings of a dataclass that somebody gave another value than the default, but the run folder."""
    found = {}
    for entry in fields(settings):
        made = entry.default_factory
        default = entry.default if made is MISSING else made()
        value = getattr(settings, entry.name)
        # Others differ because they follow from a setting, the clock or the machine.
        if entry.name in given and entry.name != "output_dir" and value != default:
            found[entry.name] = value
    return found


def take_back(config: Any) -> None:
    """Leave out again what was filled in: what it must be now may be something else."""
    for name, value in vars(config).items():
        if is_filled(value):
            setattr(config, name, None)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings without marks, for JSON and YAML."""
    plainly = {FilledText: str, FilledNumber: float}
    return {
        name: plainly.get(type(value), lambda same: same)(value) for name, value in values.items()
    }
