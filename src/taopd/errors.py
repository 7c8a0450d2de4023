"""Errors a user can mend. Each message says what is wrong, where, and what to do.

Everything here derives from `ValueError`, so that a caller who catches the built-in keeps working; the
command line turns a `TaopdError` into one line on stderr and exit status 2, anything else is a bug and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from numbers import Real


class TaopdError(ValueError):
    """Base of the errors that are the caller's to mend."""

    together = False
    """Every process raises it at the same point, so that they can still save a checkpoint."""


class ConfigError(TaopdError):
    """A setting that does not exist, or a value outside its range."""


class ShapeError(TaopdError):
    """A tensor whose shape does not fit the others."""


class DataError(TaopdError):
    """A dataset, model, tokenizer or run folder that is missing, unreadable or not what it should be."""


class NumericsError(TaopdError):
    """A NaN or an infinity where a finite number belongs."""

    def __init__(
        self,
        message: str,
        *,
        index: int | None = None,
        completion: int | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__(message)
        self.index = index
        """Which of the rows that were checked."""
        self.completion = completion
        """Which completion of the generation batch, and which token of it; None where it has no place."""
        self.position = position


class ResourceError(TaopdError):
    """Memory or disk space ran out, or a folder cannot be written."""


class TeacherError(TaopdError):
    """A teacher's server refuses, or answers what cannot be true."""

    together = True


class TeacherUnavailable(TeacherError):
    """A teacher's server stayed away for longer than it is waited for."""


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse a setting's value where a condition does not hold.

    Raises:
        ConfigError: names the setting, its value and what is expected.
    """
    if not holds:
        raise out_of_range(name, value, expected)


def root_error(error: BaseException) -> BaseException:
    """The error that began a chain of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def out_of_range(name: str, value: object, expected: str) -> ConfigError:
    """The error of a setting whose value is not what is expected."""
    return ConfigError(f"{name}={value!r}: must be {expected}")


def check_budget(budget: object, name: str = "budget") -> None:
    """Refuse a share of the valid tokens outside (0, 1]; NaN and text are outside too.

    Raises:
        ConfigError: names the setting.
    """
    if not (isinstance(budget, Real) and 0.0 < float(budget) <= 1.0):
        raise out_of_range(name, budget, "in (0, 1]; it is a share, five percent is 0.05")


def require_known(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a setting's value that is none of the known ones.

    Raises:
        ConfigError: with the nearest known value.
    """
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown.{suggest(str(value), known)}")


def nearest(word: object, known: Iterable[object]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest known word, "" where none is near.

    Example:
        >>> nearest("teachabilty", ["teachability", "random"])
        " Did you mean 'teachability'?"
    """
    # Keys of a YAML file may be numbers, null or true.
    close = difflib.get_close_matches(str(word), sorted(map(str, known)), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def suggest(word: object, known: Iterable[object]) -> str:
    """Return the nearest known word as `nearest` does, or the list of known words, if there are any."""
    known = sorted(map(str, known))
    return nearest(word, known) or (f" Known: {', '.join(known)}." if known else "")
