"""The noise floor of a study: which differences it cannot tell apart, in numbers and in words.

From the standard deviations of the paired differences, pooled over comparisons (root mean square). Arms
in which a seed collapsed are pooled apart: one collapse moves a difference by tens of points and would hide
how well the others are known.
"""

from collections.abc import Sequence
from typing import Any

from taopd.experiments.study.statistics import (
    LEVEL,
    POWER,
    minimum_detectable_difference,
    pooled_deviation,
)


def floor(arms: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Minimum detectable differences (as accuracies) and the sentence that says them.

    `stable` pools comparisons in which no seed of either arm collapsed, `all` every comparison,
    `corrected` is `stable` (or else `all`) at the level of Holm's first step.
    """
    fallen = {arm["name"] for arm in arms if arm["collapsed_share"] > 0}
    stable = [row for row in comparisons if not {row["arm"], row["reference"]} & fallen]
    num_seeds = min((len(row["seeds"]) for row in comparisons), default=0)
    tests = sum(row["p"] is not None for row in comparisons)

    def detectable(rows: Sequence[dict[str, Any]], alpha: float) -> float | None:
        deviation = pooled_deviation([row["standard_deviation"] for row in rows])
        if deviation is None:
            return None
        return minimum_detectable_difference(deviation, num_seeds, alpha=alpha)

    alpha = 1 - LEVEL
    numbers = {
        "num_seeds": num_seeds,
        "num_tests": tests,
        "stable": detectable(stable, alpha),
        "all": detectable(comparisons, alpha),
        "corrected": detectable(stable or comparisons, alpha / max(1, tests)),
    }
    return numbers | {"words": _words(numbers, stable, comparisons)}


def _words(
    numbers: dict[str, Any],
    stable: Sequence[dict[str, Any]],
    comparisons: Sequence[dict[str, Any]],
) -> str:
    seeds = numbers["num_seeds"]
    if not comparisons:
        return "There is no control to compare with, so no difference can be judged."
    if seeds < 2:
        if any(len(row["seeds"]) > 1 for row in comparisons):
            return (
                "Some arms have one seed in common with their controls: of these nobody can say what "
                "another seed would give."
            )
        known = any(row.get("over_problems") for row in comparisons)
        also = "The intervals are over held-out problems alone. " if known else ""
        return f"{also}With one seed nobody can say what another seed would give: run more seeds."
    least = numbers["all"] if numbers["stable"] is None else numbers["stable"]
    basis = f"{100 * POWER:.0f} % power, two-sided 5 %"
    if numbers["stable"] is None:
        parts = [
            f"{_floor(numbers['all'], seeds)} ({basis}); some seed collapsed in every comparison"
        ]
    else:
        parts = [f"{_floor(numbers['stable'], seeds)} ({basis})"]
        if len(stable) < len(comparisons):
            parts[0] += ", between arms in which no seed collapsed"
            if least < 1:
                parts.append(f"over all comparisons the floor is {_points(numbers['all'])}")
    if numbers["num_tests"] > 1 and least < 1:
        corrected = _points(numbers["corrected"])
        parts.append(f"after correction for {numbers['num_tests']} tests it is {corrected}")
    return "; ".join(parts) + "."


def _floor(value: float, seeds: int) -> str:
    if value >= 1:
        return f"No two accuracies can be told apart with {seeds} seeds"
    return f"Differences below {_points(value)} cannot be told apart with {seeds} seeds"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points" if value < 1 else "above 100 points"
