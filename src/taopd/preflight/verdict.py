"""A verdict: what one check found, how bad it is, and what to do."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from taopd.errors import TaopdError

Level = Literal["pass", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("pass", "warn", "fail")
"""Ascending."""

Problem = tuple[Level, str]
"""How bad, and what is wrong and what to do about it, in one sentence or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one item of `taopd check`.

    Example:
        >>> judge("context", "8 + 9 of 64 tokens", []).level
        'pass'
    """

    item: str
    level: Level
    measured: str
    """The measured figure in words, with its unit."""
    advice: str = ""
    """What is wrong and what to do; empty on a pass."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same figures as plain values; units in the names."""
    difference: tuple[tuple[str, str], ...] = ()
    """Pieces of two texts, each with whose it is: "both", "student" or "teacher"."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge(
    item: str,
    measured: str,
    problems: Iterable[Problem],
    *,
    figures: dict[str, Any] | None = None,
    difference: tuple[tuple[str, str], ...] = (),
) -> Verdict:
    """The verdict that the worst problem asks for; none is a pass."""
    found = sorted(problems, key=lambda problem: -LEVELS.index(problem[0]))
    return Verdict(
        item=item,
        level=found[0][0] if found else "pass",
        measured=measured,
        advice=" ".join(text for _, text in found),
        figures=figures or {},
        difference=difference,
    )


def guarded(item: str, check: Callable[[], Verdict]) -> Verdict:
    """Run one check; whatever it raises is a fail of this check and of no other."""
    try:
        return check()
    except TaopdError as error:  # says itself what to do
        return Verdict(item=item, level="fail", measured="refused", advice=_line(error))
    except Exception as error:
        return Verdict(
            item=item,
            level="fail",
            measured="the check itself broke",
            advice=f"{type(error).__name__}: {_line(error)}",
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
