"""From the results of arms to the results of a study: means, paired differences, noise floor, in words.

Takes what `experiments.arm.run_arm` writes, one mapping per arm and seed, and nothing else; an engine that
writes the same keys is compared the same way. Needed: name, selector, budget, seed, accuracy_greedy,
accuracy_sampled, accuracy_curve. Used where present: accuracy_sampled_curve, kept_fraction,
num_test_prompts, selected_tokens, selected_tokens_curve, prompt_digests, loss, learning_rate, stopped_by,
right_greedy_curve, right_sampled_curve.

Wall-clock values are left out of `analyse` and kept by `timings`, so that the results of a study that was
killed and resumed are those of one that was not, byte for byte.

Tests: every arm against its full and its random control on the primary metric, one Holm family over all
of them. The other metric is described, not tested.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from taopd.errors import DataError
from taopd.experiments.study import by_problem, noise, own_best
from taopd.experiments.study.statistics import Estimate, accuracy_estimate, holm

COLLAPSE_POINTS = 20.0
"""Points of accuracy below its own best at which a seed's final accuracy counts as collapsed. Far above
evaluation noise (one standard error is 2 points on 500 problems), below every collapse of the tiny lab."""
METRICS = ("greedy", "sampled")
REFERENCES = ("full", "random")
_WALL_CLOCK = ("train_seconds", "train_seconds_curve")
_KEPT_KEYS = (
    *("name", "selector", "method", "budget", "loss", "learning_rate", "seed", "steps"),
    "stopped_by",
    *("base_accuracy", "accuracy_greedy", "accuracy_sampled"),
    *("accuracy_curve", "accuracy_sampled_curve", "num_test_prompts"),
    *("kept_fraction", "selected_share_by_kind", "selected_tokens", "selected_tokens_curve"),
)

Outcome = Mapping[str, Any]
Controls = Mapping[str, Mapping[str, str | None]]
"""Arm's name to {"full": name or None, "random": name or None}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is held equal over the arms, and how the study is judged."""

    equal: str = "steps"
    amount: float | None = None
    metric: str = "greedy"
    collapse_points: float = COLLAPSE_POINTS
    rates: tuple[float, ...] = ()
    """Learning rates at which every arm was run; its outcomes bear the names of `own_best.at_rate`."""
    shared_rate: float | None = None
    """The one that the study's config names."""


def analyse(
    outcomes: Sequence[Outcome],
    *,
    controls: Controls | None = None,
    question: Question | None = None,
) -> dict[str, Any]:
    """Return what the study's `results.json` holds; no wall-clock values.

    Args:
        controls: which arm is whose control; default: the random arm of the same budget and loss, and
            the full arm of the same loss.

    Raises:
        DataError: no outcomes, one arm and seed twice, or one without the accuracy that is asked for.
    """
    question = question or Question()
    groups = by_arm(outcomes)
    asked = (f"accuracy_{question.metric}", _curve_of(question.metric))
    for outcome in outcomes:
        if missing := [key for key in asked if key not in outcome]:
            raise DataError(f"{outcome['name']}, seed {outcome['seed']}: it has no {missing[0]}")
    controls = find_controls(groups) if controls is None else controls
    arms = [_describe(name, group, question) for name, group in groups.items()]
    _note_formats(arms, groups)
    comparisons = _compare(groups, controls, question)
    several: dict[str, Any] = {}
    if question.rates:
        several["rates"] = own_best.compare(
            groups,
            controls,
            rates=question.rates,
            shared_rate=question.shared_rate,
            metric=question.metric,
        )
    return {
        "question": asdict(question),
        "seeds": sorted({outcome["seed"] for outcome in outcomes}),
        "arms": arms,
        "comparisons": comparisons,
        "noise_floor": noise.floor(arms, comparisons),
        "pairing": _pairing(groups),
        "outcomes": [
            {key: outcome[key] for key in _KEPT_KEYS if key in outcome} for outcome in _flat(groups)
        ],
    } | several


def timings(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Wall-clock seconds of every arm and seed, evaluation left out."""
    return [
        {"name": outcome["name"], "seed": outcome["seed"]}
        | {key: outcome[key] for key in _WALL_CLOCK if key in outcome}
        for outcome in outcomes
    ]


Groups = dict[str, dict[int, Outcome]]


def by_arm(outcomes: Sequence[Outcome]) -> Groups:
    """Outcomes by arm, in order of appearance, and by seed, ascending.

    Raises:
        DataError: without outcomes, or with two of an arm and a seed.
    """
    if not outcomes:
        raise DataError("there are no results to compare")
    groups: Groups = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome["seed"]):
        group = groups.setdefault(outcome["name"], {})
        if outcome["seed"] in group:
            raise DataError(f"two results of arm {outcome['name']!r} with seed {outcome['seed']}")
        group[outcome["seed"]] = outcome
    order = dict.fromkeys(outcome["name"] for outcome in outcomes)
    return {name: groups[name] for name in order}


def _flat(groups: Groups) -> list[Outcome]:
    return [outcome for group in groups.values() for outcome in group.values()]


def find_controls(groups: Groups) -> dict[str, dict[str, str | None]]:
    """Each arm's random arm of the same budget, loss and learning rate, and full arm of the same two."""
    first = {name: next(iter(group.values())) for name, group in groups.items()}

    def find(of: Outcome, selector: str) -> str | None:
        for name, other in first.items():
            same = selector == "full" or other["budget"] == of["budget"]
            same = same and all(other.get(k) == of.get(k) for k in ("loss", "learning_rate"))
            if other["selector"] == selector and same:
                return name
        return None

    return {
        name: {selector: find(of, selector) for selector in REFERENCES}
        for name, of in first.items()
    }


def collapsed(outcome: Outcome, points: float, metric: str = "greedy") -> bool:
    """Whether the final accuracy lies more than `points` below the best one of its own curve."""
    curve = outcome[_curve_of(metric)]
    best = max(accuracy for _, accuracy in curve)
    return bool(100 * (best - curve[-1][1]) > points)


def _curve_of(metric: str) -> str:
    return "accuracy_curve" if metric == "greedy" else "accuracy_sampled_curve"


def _accuracy(outcome: Outcome, metric: str) -> float:
    return float(outcome[f"accuracy_{metric}"])


def _describe(name: str, group: dict[int, Outcome], question: Question) -> dict[str, Any]:
    first = next(iter(group.values()))
    described: dict[str, Any] = {
        "name": name,
        "selector": first["selector"],
        "budget": first["budget"],
        "loss": first.get("loss"),
        "num_seeds": len(group),
        "base_accuracy": _base(group, question.metric),
    }
    for metric in METRICS:
        if any(f"accuracy_{metric}" not in outcome for outcome in group.values()):
            continue
        values = [_accuracy(outcome, metric) for outcome in group.values()]
        estimate = accuracy_estimate(values, first.get("num_test_prompts"))
        described[metric] = {
            "mean": estimate.mean,
            "median": median(values),
            **_interval(estimate),
            "values": values,
        }
    fallen = [
        seed
        for seed, outcome in group.items()
        if collapsed(outcome, question.collapse_points, question.metric)
    ]
    described |= {"collapsed_share": len(fallen) / len(group), "collapsed_seeds": fallen}
    for key in ("kept_fraction", "selected_tokens", "steps"):
        if all(key in outcome for outcome in group.values()):
            described[key] = math.fsum(o[key] for o in group.values()) / len(group)
    if note := _unequal(group, question):
        described["note"] = note
    return described


def _base(group: dict[int, Outcome], metric: str) -> float:
    """Accuracy of the student before, as the study judges it; sampled answers differ between seeds."""
    if metric == "greedy":
        first = next(iter(group.values()))
        return float(first.get("base_accuracy", first["accuracy_curve"][0][1]))
    starts = [outcome[_curve_of(metric)][0][1] for outcome in group.values()]
    return math.fsum(starts) / len(starts)


def _unequal(group: dict[int, Outcome], question: Question) -> str:
    """In what an arm does not have what all arms are said to have in common; empty if it has it."""
    stopped = [seed for seed, o in group.items() if o.get("stopped_by") == "collapse_guard"]
    words = [f"the collapse guard ended seeds {stopped} early"] if stopped else []
    short = [seed for seed, o in group.items() if o.get("stopped_by") == "max_steps"]
    if question.equal in ("selected_tokens", "seconds") and short:
        words.append(f"seeds {short} reached max_steps before the common total")
    if question.equal == "steps" and question.amount:
        steps = {o["steps"] for seed, o in group.items() if "steps" in o and seed not in stopped}
        if other := sorted(steps - {question.amount}):
            words.append(f"it took {', '.join(map(str, other))} steps, not {question.amount:g}")
    return "; ".join(words)


def _note_formats(arms: Sequence[dict[str, Any]], groups: Groups) -> None:
    """Note at every arm in which number format it computed, where the study has several: another machine, or
    a GPU that was there for some arms alone."""
    if len({outcome.get("dtype") for outcome in _flat(groups)} - {None}) < 2:
        return
    for arm in arms:
        own = groups[arm["name"]]
        formats = sorted(
            {str(outcome.get("dtype", "an unknown format")) for outcome in own.values()}
        )
        note = f"it computed in {' and '.join(formats)}, as not all arms did"
        arm["note"] = "; ".join(filter(None, (arm.get("note"), note)))


def _compare(groups: Groups, controls: Controls, question: Question) -> list[dict[str, Any]]:
    """Every arm against its controls, on the seeds that both have; Holm over all of them."""
    pairs = [
        (name, kind, reference)
        for name in groups
        for kind in REFERENCES
        if (reference := controls.get(name, {}).get(kind)) in groups and reference != name
    ]
    rows, estimates = [], []
    for name, kind, reference in pairs:
        assert reference is not None
        shared = [seed for seed in groups[name] if seed in groups[reference]]
        if not shared:
            continue
        differences = [
            _accuracy(groups[name][seed], question.metric)
            - _accuracy(groups[reference][seed], question.metric)
            for seed in shared
        ]
        problems = groups[name][shared[0]].get("num_test_prompts")
        estimate = accuracy_estimate(differences, problems, paired=True)
        estimates.append(estimate)
        rows.append(
            {"arm": name, "to": kind, "reference": reference, "seeds": shared}
            | {"difference": estimate.mean, **_interval(estimate), "p": estimate.p}
            | {"over_problems": _over_problems(groups[name], groups[reference], question.metric)}
        )
    for row, p in zip(rows, holm([estimate.p for estimate in estimates]), strict=True):
        row["p_holm"] = p
    return rows


def _over_problems(
    one: dict[int, Outcome], other: dict[int, Outcome], metric: str
) -> dict[str, Any] | None:
    found = by_problem.difference(one, other, metric)
    return None if found is None else {"low": found.low, "high": found.high}


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {name: getattr(estimate, name) for name in ("low", "high", "standard_deviation")}


def _pairing(groups: Groups) -> dict[str, Any]:
    """Whether the arms of a seed saw the same prompts in the same order, as far as both went."""
    outcomes = _flat(groups)
    if not all(outcome.get("prompt_digests") for outcome in outcomes):
        return {"same_prompts": None, "words": "the order of the prompts was not recorded"}
    digests: dict[tuple[int, int], set[str]] = {}
    for outcome in outcomes:
        for step, digest in outcome["prompt_digests"]:
            digests.setdefault((outcome["seed"], step), set()).add(digest)
    differing = sorted({seed for (seed, _), found in digests.items() if len(found) > 1})
    if differing:
        words = f"in seeds {differing} the arms did not see the same prompts in the same order"
        return {"same_prompts": False, "words": words}
    return {"same_prompts": True, "words": "within a seed, all arms saw the same prompts in order"}
