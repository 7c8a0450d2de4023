"""A verdict: what one check found, how bad it is, and what to do."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from taopd.errors import ConfigError

Level = Literal["pass", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("pass", "warn", "fail")
"""Ascending."""
BROKEN = "not looked at: the check itself broke"
"""What an item measured that raised an error of no user's making."""

Problem = tuple[Level, str]
"""How bad, and what is wrong and what to do about it, in one sentence or two."""


class Problems(list[Problem]):
    """What is wrong with one item."""

    def warn(self, text: str) -> None:
        """Add what may be meant."""
        self.append(("warn", text))

    def fail(self, text: str) -> None:
        """Add what makes the run wrong."""
        self.append(("fail", text))


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

    @property
    def line(self) -> str:
        """The verdict in one line."""
        return f"{self.level}: {self.item}: {self.measured}. {self.advice}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Verdicts(list[Verdict]):
    """The outcome of a check; printed, a line for each item."""

    def __str__(self) -> str:
        return "\n".join(verdict.line for verdict in self)

    def refuse_fail(self, then: str) -> None:
        """Refuse to begin a run whose check failed.

        Args:
            then: how to see all items, and how to begin all the same.

        Raises:
            ConfigError: names the items, with the advice of the first.
        """
        failed = [verdict for verdict in self if verdict.level == "fail"]
        if failed:
            names = ", ".join(verdict.item for verdict in failed)
            raise ConfigError(
                f"the check before training failed ({names}): {failed[0].advice} {then}"
            )

    def as_dict(self) -> dict[str, Any]:
        """What `taopd check --json` prints and `check.json` holds."""
        counts = {level: sum(verdict.level == level for verdict in self) for level in LEVELS}
        return {"counts": counts, "items": [verdict.as_dict() for verdict in self]}


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
