"""Accuracy of the arms: at the end, against the controls, over the training."""

import math
from collections.abc import Sequence
from typing import Any

from taopd.experiments.study.own_best import at_rate
from taopd.experiments.study.statistics import accuracy_estimate, cut_end, wilson
from taopd.report.arms import color_of
from taopd.report.charts import NUM_COLORS, Series, figure, lines, number
from taopd.report.folders import Study
from taopd.report.row_charts import intervals
from taopd.report.sections.tables import first_of, percent, points, points_span, span, table
from taopd.report.text import escape

LEAD = "Held-out accuracy of every arm, in per cent."

WIDE = (540, 250)

Outcome = dict[str, Any]
Groups = dict[str, list[Outcome]]
Estimates = dict[str, dict[str, tuple[float, float | None, float | None]]]
"""By arm and metric: mean, low, high."""


def groups_of(study: Study) -> Groups:
    """Outcomes by arm, in order of appearance."""
    groups: Groups = {}
    for outcome in study.outcomes:
        groups.setdefault(str(outcome.get("name", "?")), []).append(outcome)
    return groups


def at_shared_rate(study: Study) -> Groups:
    """The groups of a study, only those of the shared learning rate where it has several."""
    groups, found = groups_of(study), study.results.get("rates")
    if not found:
        return groups
    suffix = at_rate("", found["shared_rate"])
    return {name: group for name, group in groups.items() if name.endswith(suffix)}


def judged_by(study: Study) -> str:
    """The metric of which a study's differences are."""
    asked = study.results.get("question", {}).get("metric", "greedy")
    known = all("accuracy_sampled_curve" in row for row in study.outcomes)
    return "sampled" if asked == "sampled" and known else "greedy"


def interval(values: Sequence[float], num_prompts: int | None) -> tuple[float, float, float] | None:
    """Mean and 95 % interval: of the mean over seeds (t), for one seed over prompts (Wilson).

    None where neither is known.
    """
    found = accuracy_estimate(values, num_prompts)
    if found.low is not None and found.high is not None:
        return found.mean, found.low, found.high
    return (found.mean, *wilson(found.mean, num_prompts)) if num_prompts else None


def estimates_of(study: Study) -> Estimates:
    """(mean, low, high) of an arm's accuracies; the study's own analysis where it has an interval."""
    found: dict[str, dict[str, Any]] = {}
    for name, outcomes in groups_of(study).items():
        for metric in ("greedy", "sampled"):
            values = [o[f"accuracy_{metric}"] for o in outcomes if f"accuracy_{metric}" in o]
            if values:
                known = interval(values, outcomes[0].get("num_test_prompts"))
                mean = math.fsum(values) / len(values)
                found.setdefault(name, {})[metric] = known or (mean, None, None)
    for arm in study.results.get("arms", []):
        for metric in ("greedy", "sampled"):
            own = arm.get(metric)
            # One seed has no interval over seeds: the one over prompts stands.
            if isinstance(own, dict) and isinstance(own.get("low"), int | float):
                estimate = (own["mean"], *(cut_end(own.get(end), 0.0) for end in ("low", "high")))
                found.setdefault(str(arm.get("name", "?")), {})[metric] = estimate
    return found


def interval_words(study: Study) -> str:
    """The kind and the size of a study's intervals, for captions."""
    counts = sorted({len(outcomes) for outcomes in groups_of(study).values()})
    prompts = next(
        (row["num_test_prompts"] for row in study.outcomes if row.get("num_test_prompts")), 0
    )
    held_out = f"{prompts:,} held-out prompts" if prompts else "held-out prompts"
    one = f"95 % Wilson interval over {held_out}" if prompts else "no interval"
    several = [count for count in counts if count > 1]
    if not several:
        return f"{one}, one training seed"
    seeds = " to ".join(str(count) for count in dict.fromkeys((several[0], several[-1])))
    words = f"95 % t interval of the mean over {seeds} training seeds, {held_out}"
    # In a study that is not finished some arms may have one.
    return words if counts[0] > 1 else f"{words}; of an arm with one seed {one}"


def body(studies: Sequence[Study]) -> str:
    """Per study: the interval chart, the table, tests against the controls, accuracy over steps."""
    return "".join(part for study in studies if (part := _study(study)))


def heading(study: Study) -> str:
    """The name of a study's folder, which its runs bear too, and what it was about where it says so."""
    task = study.results.get("task") or study.results.get("name")
    return study.name if task in (None, study.name) else f"{study.name}: {task}"


def _study(study: Study) -> str:
    estimates = estimates_of(study)
    if not estimates:
        return ""
    groups = groups_of(study)
    task = heading(study)
    before = next((row["base_accuracy"] for row in study.outcomes if "base_accuracy" in row), None)
    rows, dots = [], []
    for name, found in estimates.items():
        outcomes = groups.get(name, [])
        cells = [name]
        for metric in ("greedy", "sampled"):
            mean, low, high = found.get(metric, (None, None, None))
            cells += [percent(mean), span(low, high)]
            if metric == "greedy" and mean is not None:
                scale = [None if v is None else 100 * v for v in (mean, low, high)]
                dots.append((name, float(scale[0] or 0.0), scale[1], scale[2]))
        kept = [o["kept_fraction"] for o in outcomes if "kept_fraction" in o]
        best = [max(y for _, y in o["accuracy_curve"]) for o in outcomes]
        cells.append(percent(sum(best) / len(best)) if best else "–")
        cells.append(percent(sum(kept) / len(kept)) if kept else "–")
        rows.append([*cells, str(len(outcomes) or "–")])
    heads = ["arm", "greedy, %", "95 %", "sampled, %", "95 %", "own best, %", "kept, %", "seeds"]
    note = f"{interval_words(study)}; the line is the student before" if before is not None else ""
    parts, ends = [f"<h3>{escape(task)}</h3>"], ""
    if dots:
        chart = intervals(
            f"accuracy by arm, {task}",
            dots,
            x_label="greedy accuracy at the end, %",
            reference=None if before is None else 100 * before,
            colors=[color_of(study, name) for name, *_ in dots],
        )
        ends = figure("Greedy accuracy at the end, %", chart, note)
    parts.append(f'<div class="figures grid">{ends}{_curves(study, groups)}</div>')
    parts.append(table(heads, rows, numeric=range(1, 8)))
    parts.append(_comparisons(study))
    return "".join(parts)


def _comparisons(study: Study) -> str:
    """Paired differences to the controls, as the study's analysis gives them."""
    rows = [
        [
            str(row.get("arm", "")),
            str(row.get("reference", "")),
            points(row["difference"]),
            *(
                points_span(ends.get("low"), ends.get("high"))
                for ends in (row, row.get("over_problems") or {})
            ),
            "–" if row.get("p_holm") is None else number(row["p_holm"]),
        ]
        for row in study.results.get("comparisons", [])
        if "difference" in row
    ]
    if not rows:
        return ""
    over = [f"95 % over {units}" for units in ("seeds", "problems")]
    heads = ["arm", "against", "difference, points", *over, "p over seeds (Holm)"]
    # One seed has no interval over seeds and no p.
    known = [place for place in range(len(heads)) if any(row[place] != "–" for row in rows)]
    heads, *rows = [[cells[place] for place in known] for cells in (heads, *rows)]
    numeric = range(2, len(heads))
    head = f"Against the controls, same seeds, {judged_by(study)} accuracy"
    return f"<h3>{head}</h3>{table(heads, rows, numeric=numeric)}"


def _curves(study: Study, groups: Groups) -> str:
    """Accuracy over steps: one chart for a few arms, one each for many."""
    series = [
        found
        for name, group in groups.items()
        if (found := _over_steps(name, group, color_of(study, name)))
    ]
    if not series:
        return ""
    band = "; band: lowest and highest seed" if series[0].low else ""
    if len(series) <= 4:
        to = ceiling(series)
        chart = lines("accuracy over steps", series, to=to, names=True, size=WIDE)
        return figure("Greedy accuracy over steps, %", chart, band.removeprefix("; "))
    shown = series[: 3 * NUM_COLORS]
    charts = [figure(one.label, lines(one.label, [one], to=ceiling(shown))) for one in shown]
    title = f"Greedy accuracy over steps, %{band}"
    note = first_of(len(shown), len(series), "arms")
    return f'</div><h3>{title}</h3>{note}<div class="grid">{"".join(charts)}'


def ceiling(series: Sequence[Series], *others: float | None) -> float:
    """Where an axis of accuracies in per cent ends: the first of a few round numbers above all of them."""
    values = [y for one in series for _, y in [*one.points, *one.high]]
    highest = max([*values, *(other for other in others if other is not None)])
    return next((top for top in (10.0, 25.0, 50.0, 75.0) if highest < top), 100.0)


def _over_steps(name: str, outcomes: list[Outcome], color: int) -> Series | None:
    """Mean over seeds at the steps that all seeds have, band from the lowest to the highest."""
    curves = [dict(map(tuple, outcome["accuracy_curve"])) for outcome in outcomes]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return None
    at = [[curve[step] for curve in curves] for step in steps]
    several = len(curves) > 1
    return Series(
        label=name,
        # Computed as the number of the table, which could else be rounded another way.
        points=[(s, 100 * (math.fsum(v) / len(v))) for s, v in zip(steps, at, strict=True)],
        color=color,
        low=[(s, 100 * min(v)) for s, v in zip(steps, at, strict=True)] if several else [],
        high=[(s, 100 * max(v)) for s, v in zip(steps, at, strict=True)] if several else [],
    )
