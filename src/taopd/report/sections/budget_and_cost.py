"""Accuracy of the arms by budget, and against tokens and seconds."""

from collections.abc import Sequence
from dataclasses import replace

from taopd.report.arms import color_of, plain_arm
from taopd.report.charts import MOST_NAMED, Series, figure, key, lines
from taopd.report.folders import Run, Sources, Study
from taopd.report.sections.accuracy import (
    WIDE,
    Outcome,
    at_shared_rate,
    ceiling,
    estimates_of,
    heading,
    interval_words,
)
from taopd.report.text import escape
from taopd.runs.shares import per_cent

BUDGET_LEAD = "Accuracy at the end by the share of tokens that trained."
COST_LEAD = "Accuracy by trained tokens and by training time, first seed of every arm."


def budget_curve(studies: Sequence[Study]) -> str:
    """Final greedy accuracy over the kept share, one line per selector with two budgets or more."""
    parts = []
    for study in studies:
        estimates, groups = estimates_of(study), at_shared_rate(study)
        points: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
        arms: dict[str, str] = {}  # the first of a line, whose color it has
        known = [name for name in groups if "greedy" in estimates.get(name, {})]
        for name in known:
            first = groups[name][0]
            place = first.get("budget", first.get("kept_fraction"))
            if isinstance(place, int | float):
                mean, *span = estimates[name]["greedy"]
                low, high = (None if end is None else 100 * end for end in span)
                label = _chosen_by(first, study)
                arms.setdefault(label, name)
                points.setdefault(label, []).append((100 * place, 100 * mean, low, high))
        # Two arms at one budget differ in something else: no line joins them.
        several = {k: sorted(v) for k, v in points.items() if 1 < len(v) == len({p[0] for p in v})}
        if not several:
            continue
        series = [
            Series(
                label=label,
                points=[(x, mean) for x, mean, _, _ in rows],
                color=color_of(study, arms[label]),
                low=[(x, low) for x, _, low, _ in rows if low is not None],
                high=[(x, high) for x, _, _, high in rows if high is not None],
            )
            for label, rows in several.items()
        ]
        ends = (estimates[name]["greedy"][0] for name in known if plain_arm(name) == "full")
        full = next((100 * mean for mean in ends), None)
        chart = lines(
            "budget", series, x_label="budget, %", to=ceiling(series, full), limit=full, size=WIDE
        )
        words = f"{study.name}; {interval_words(study)}"
        if full is not None:
            words += f"; the level line is full distillation, {per_cent(full / 100)} %"
        parts.append(
            key([(one.label, one.color) for one in series])
            + figure("Greedy accuracy by share of tokens, %", chart, words)
        )
    return "".join(parts)


def _chosen_by(outcome: Outcome, study: Study) -> str:
    """The selector, with its method where the study has several of it."""
    selector = str(outcome.get("selector", outcome.get("name")))
    methods = {o.get("method") for o in study.outcomes if o.get("selector") == selector}
    return selector if len(methods) < 2 else f"{selector}, {outcome.get('method')}"


def against_cost(sources: Sources) -> str:
    """Accuracy over trained tokens and over training seconds, first seed of every arm."""
    parts = []
    by_path = {run.path: run for run in sources.runs}
    for study in sources.studies:
        tokens: list[Series] = []
        seconds: list[Series] = []
        for name, outcomes in at_shared_rate(study).items():
            outcome = outcomes[0]
            run = by_path.get(study.path / "arms" / f"{name}-seed{outcome.get('seed')}")
            for found, keys, curve in (
                (tokens, "select/kept_tokens", "selected_tokens_curve"),
                (seconds, "step_time", "train_seconds_curve"),
            ):
                cost = dict(map(tuple, outcome.get(curve) or [])) or _summed(run, keys)
                pairs = [(cost[s], 100 * y) for s, y in outcome["accuracy_curve"] if s in cost]
                if len(pairs) > 1:
                    color = color_of(study, name)
                    found.append(Series(label=name, points=pairs, color=color))
        charts = [
            _cost_chart(title, label, found)
            for title, label, found in (
                ("Accuracy against trained tokens, %", "tokens that trained", tokens),
                ("Accuracy against training time, %", "seconds, evaluation left out", seconds),
            )
            if found
        ]
        if charts:
            shown = max(len(tokens), len(seconds)) > MOST_NAMED
            own = [(name, color_of(study, name)) for name in at_shared_rate(study)]
            title = f"<h3>{escape(heading(study))}</h3>" if len(sources.studies) > 1 else ""
            parts.append(
                f'{title}{key(own) if shown else ""}<div class="figures grid">{"".join(charts)}</div>'
            )
    return "".join(parts)


def _cost_chart(title: str, label: str, series: list[Series]) -> str:
    """A logarithmic axis where one arm pays several times what another pays; it has no 0."""
    paid = [one.points[-1][0] for one in series]
    log = max(paid) > 4 * min(paid) > 0
    if log:
        series = [
            replace(one, points=[point for point in one.points if point[0] > 0]) for one in series
        ]
        label = f"{label} (logarithmic)"
    to = ceiling(series)
    return figure(
        title, lines(title, series, x_label=label, to=to, log_x=log, names=True, size=WIDE)
    )


def _summed(run: Run | None, name: str) -> dict[float, float]:
    """A metric summed up to every step that was logged, of which each has the mean since the one before."""
    sums = {0.0: 0.0}
    for step, value in [] if run is None else run.curve(name):
        last = max(sums)
        sums[step] = sums[last] + value * (step - last)
    return sums if len(sums) > 1 else {}
