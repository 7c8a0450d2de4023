"""Arms of a study at several learning rates: at a shared rate, and each at its own best one.

The intervals are those of `best_of`, over two kinds of units. Over training seeds: would other runs differ?
Over problems, each a mean over seeds: do these trained models differ on other problems? What every rate
alone says is in the study's ordinary table, whose arms are arm and rate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taopd.errors import DataError
from taopd.experiments.study import by_problem
from taopd.experiments.study.best_of import Bounds, between_best, spread
from taopd.experiments.study.statistics import cut_end, holm

UNITS = ("over_seeds", "over_problems")
BASES = ("own_best", "shared")

Outcomes = Mapping[int, Mapping[str, Any]]
"""Seed to outcome."""
Rated = Mapping[float, Outcomes]
"""An arm: rate to its seeds."""


def at_rate(arm: str, rate: float) -> str:
    """Name of an arm at a learning rate.

    Example:
        >>> at_rate("full", 5e-5)
        'full,lr=5e-05'
    """
    return f"{arm},lr={rate:g}"


def without_rate(name: str, rates: Sequence[float]) -> tuple[str, float] | None:
    """The arm and the rate of a name that `at_rate` made; None for another name.

    Example:
        >>> without_rate("full,lr=5e-05", [1e-5, 5e-5])
        ('full', 5e-05)
    """
    for rate in rates:
        if name.endswith(suffix := at_rate("", rate)):
            return name.removesuffix(suffix), rate
    return None


def rated_arms(groups: Mapping[str, Outcomes], rates: Sequence[float]) -> dict[str, Rated]:
    """Outcomes by arm, rate (ascending) and seed; groups whose name has no rate are left out."""
    arms: dict[str, dict[float, Outcomes]] = {}
    for name, group in groups.items():
        if (found := without_rate(name, rates)) is not None:
            arms.setdefault(found[0], {})[found[1]] = group
    return {arm: dict(sorted(found.items())) for arm, found in arms.items()}


def compare(
    groups: Mapping[str, Outcomes],
    controls: Mapping[str, Mapping[str, str | None]],
    *,
    rates: Sequence[float],
    shared_rate: float | None,
    metric: str,
) -> dict[str, Any]:
    """What `results.json` says about the rates: every arm's curve, best rate, spread, and comparisons.

    Args:
        shared_rate: the rate of the study's config; None: the one at which full distillation is best.

    Raises:
        DataError: no arm bears one of the rates, or answers are not a digit, 0 or 1, for each problem.
    """
    arms = rated_arms(groups, rates)
    if not arms:
        raise DataError(f"no arm has a name that ends with one of the rates {list(rates)}")
    reader = _Reader(metric)
    chosen = shared_rate or _common_best(arms, reader)
    rows = []
    for arm, own in arms.items():
        references = controls.get(at_rate(arm, next(iter(own))), {})
        for kind, name in references.items():
            found = without_rate(name, rates) if name else None
            if found is None or found[0] == arm or found[0] not in arms:
                continue
            row = _row(own, arms[found[0]], chosen, reader)
            if row is not None:
                rows.append({"arm": arm, "to": kind, "reference": found[0]} | row)
    for basis in BASES:
        for unit in UNITS:
            asked = [row[basis][unit] for row in rows if row.get(basis) and row[basis].get(unit)]
            for bounds, p in zip(asked, holm([bounds["p"] for bounds in asked]), strict=True):
                bounds["p_holm"] = p
    return {
        "rates": list(rates),
        "shared_rate": chosen,
        "shared_by": "config" if shared_rate else "best of full" if _full(arms) else "best mean",
        "arms": [_describe(arm, own, reader) for arm, own in arms.items()],
        "comparisons": rows,
    }


class _Reader:
    """Values of an arm's rates, by unit."""

    def __init__(self, metric: str) -> None:
        self._accuracy, self._metric = f"accuracy_{metric}", metric

    def seeds(self, own: Rated, seeds: Sequence[int]) -> np.ndarray:
        """[rate, seed] accuracies."""
        return np.array([[group[seed][self._accuracy] for seed in seeds] for group in own.values()])

    def means(self, own: Rated) -> dict[float, float]:
        """Mean accuracy at every rate, over all of its seeds."""
        return {
            rate: float(self.seeds({rate: group}, sorted(group)).mean())
            for rate, group in own.items()
        }

    def problems(self, own: Rated, seeds: Sequence[int]) -> np.ndarray | None:
        """[rate, problem] shares of seeds that are right; None if that was not recorded."""
        found = [
            by_problem.right([group[seed] for seed in seeds], self._metric)
            for group in own.values()
        ]
        known = [shares for shares in found if shares is not None]
        # None of them, or other problems at other rates: nothing can be paired.
        if len(known) < len(found) or len({len(shares) for shares in known}) > 1:
            return None
        return np.array(known)


def _seeds_of(*arms: Rated) -> list[int]:
    """Seeds that every rate of every arm has."""
    found = [set(group) for own in arms for group in own.values()]
    return sorted(set.intersection(*found))


def _row(
    own: Rated,
    other: Rated,
    shared: float,
    reader: _Reader,
) -> dict[str, Any] | None:
    """An arm against a control, at own best and at the shared rate; None without a common seed."""
    seeds = _seeds_of(own, other)
    if not seeds:
        return None
    row = {"seeds": seeds, "own_best": _difference(own, other, seeds, reader), "shared": None}
    if shared in own and shared in other:
        row["shared"] = _difference({shared: own[shared]}, {shared: other[shared]}, seeds, reader)
    return row


def _difference(
    own: Rated,
    other: Rated,
    seeds: list[int],
    reader: _Reader,
) -> dict[str, Any]:
    first, second = (reader.seeds(arm, seeds) for arm in (own, other))
    best = [values.mean(1) for values in (first, second)]
    found: dict[str, Any] = {
        "rates": [list(arm)[int(m.argmax())] for arm, m in zip((own, other), best, strict=True)],
        "difference": float(best[0].max() - best[1].max()),
    }
    outcome = next(iter(own.values()))[seeds[0]]
    found["over_seeds"] = _as_dict(between_best(first, second, least=_rounding(outcome, True)))
    mine, theirs = (reader.problems(arm, seeds) for arm in (own, other))
    found["over_problems"] = None
    if mine is not None and theirs is not None and mine.shape[1] == theirs.shape[1]:
        found["over_problems"] = _as_dict(
            between_best(mine, theirs, least=by_problem.least_deviation(mine.shape[1], len(seeds)))
        )
    return found


def _rounding(outcome: Mapping[str, Any], paired: bool) -> float:
    """Deviation of rounding an accuracy over N problems to 1/N, of a difference of two if paired."""
    problems = outcome.get("num_test_prompts")
    return math.sqrt((2 if paired else 1) / 12) / problems if problems else 0.0


def _as_dict(bounds: Bounds) -> dict[str, float | None]:
    """A difference of two accuracies, cut at what one can be."""
    return _cut(bounds, -1.0) | {"p": bounds.p}


def _cut(bounds: Bounds, least: float) -> dict[str, float | None]:
    return {"low": cut_end(bounds.low, least), "high": cut_end(bounds.high, least)}


def _describe(arm: str, own: Rated, reader: _Reader) -> dict[str, Any]:
    seeds = _seeds_of(own)
    described: dict[str, Any] = {"name": arm, "num_seeds": len(seeds)}
    means = reader.means(own)
    described["curve"] = [[rate, mean] for rate, mean in means.items()]
    described["best_rate"] = max(means, key=means.__getitem__)
    described["best"] = max(means.values())
    described["spread"] = {"points": 100 * (max(means.values()) - min(means.values()))}
    described["over_seeds"] = described["over_problems"] = None
    if not seeds:
        return described
    outcome = next(iter(own.values()))[seeds[0]]
    rounding = _rounding(outcome, False), _rounding(outcome, True)
    units = [("over_seeds", reader.seeds(own, seeds), *rounding)]
    if (problems := reader.problems(own, seeds)) is not None:
        least = by_problem.least_deviation(problems.shape[1], len(seeds))
        units.append(("over_problems", problems, least, least))
    for (
        unit,
        rows,
        of_one,
        of_two,
    ) in units:  # least deviations of a value, and of a difference of two
        bounds = between_best(rows, np.zeros((1, rows.shape[1])), least=of_one)
        described[unit] = _cut(bounds, 0.0)
        _, low, high = spread(rows, least=of_two)
        ends = [None if end is None else 100 * min(1.0, end) for end in (low, high)]
        described["spread"][unit] = dict(zip(("low", "high"), ends, strict=True))
    return described


def _full(arms: Mapping[str, Rated]) -> str | None:
    """The first arm of full distillation."""
    for arm, own in arms.items():
        for group in own.values():
            if next(iter(group.values()))["selector"] == "full":
                return arm
    return None


def _common_best(arms: Mapping[str, Rated], reader: _Reader) -> float:
    """The rate at which full is best; without a full arm, at which the mean over arms is highest."""
    full = _full(arms)
    means: dict[float, list[float]] = {}
    for own in [arms[full]] if full is not None else arms.values():
        for rate, mean in reader.means(own).items():
            means.setdefault(rate, []).append(mean)
    return max(means, key=lambda rate: sum(means[rate]) / len(means[rate]))
