"""Metrics over the training steps, and what the steps cost."""

from collections.abc import Sequence

from taopd.report.charts import Series, bars, figure, key, lines, number
from taopd.report.folders import Run
from taopd.report.sections.tables import table

LEAD = "Every logging step, averaged where there are more points than pixels."
SPEED_LEAD = "Where a step's time goes, and how it compares with training every token."
MAX_RUNS = 8
CHARTS = (
    ("Loss on the kept tokens", "loss/selected_nats", "nats"),
    ("Kept share of the tokens", "select/kept_fraction", ""),
    ("Disagreement D, mean", "signal/disagreement_nats/mean", "nats"),
    ("Compatibility C, mean", "signal/compatibility/mean", ""),
    ("Student's entropy H, mean", "signal/entropy_nats/mean", "nats"),
    ("D of the kept tokens", "select/kept_disagreement_nats", "nats"),
    ("C of the kept tokens", "select/kept_compatibility", ""),
    ("Completion length", "completions/mean_length", "tokens"),
    ("Size of the update", "update/norm", "L2"),
)
QUADRANTS = (
    ("q1", "Q1: high H, high D"),
    ("q2", "Q2: high H, low D"),
    ("q3", "Q3: low H, high D"),
    ("q4", "Q4: low H, low D"),
)
STAGES = (
    ("perf/sample_s", "sample"),
    ("perf/score_s", "score"),
    ("perf/select_s", "select"),
    ("perf/anchor_s", "anchor"),
    ("perf/train_s", "train"),
)


def body(runs: Sequence[Run]) -> str:
    """Small charts of one metric each, all runs in every chart; then quadrants of the first runs."""
    logged = [run for run in runs if run.metrics][:MAX_RUNS]
    if not logged:
        return ""
    charts = []
    for title, name, unit in CHARTS:
        series = [
            Series(label=run.name, points=points, color=index)
            for index, run in enumerate(logged)
            if (points := run.curve(name))
        ]
        if series:
            charts.append(figure(title, lines(title, series), unit))
    quadrants = [_quadrants(run) for run in logged[:4]]
    legend = key([run.name for run in logged]) if len(logged) > 1 else ""
    parts = [legend, f'<div class="grid">{"".join(charts)}</div>' if charts else ""]
    if any(quadrants):
        parts.append("<h3>Quadrants of entropy and disagreement, share of the tokens</h3>")
        parts.append(key([words for _, words in QUADRANTS]))
        parts.append(f'<div class="grid">{"".join(quadrants)}</div>')
    return "".join(parts) if charts else ""


def _quadrants(run: Run) -> str:
    series = [
        Series(label=words, points=points, color=index)
        for index, (short, words) in enumerate(QUADRANTS)
        if (points := run.curve(f"select/quadrant_{short}"))
    ]
    return figure(run.name, lines(run.name, series)) if series else ""


def speed(runs: Sequence[Run]) -> str:
    """A table of seconds by stage per run, and bars of the whole step against the `full` run."""
    timed = [run for run in runs if run.curve("step_time")]
    if not timed:
        return ""
    rows, totals = [], []
    for run in timed:
        stages = [median([v for _, v in run.curve(name)]) for name, _ in STAGES]
        total = median([v for _, v in run.curve("step_time")])
        tokens = median([v for _, v in run.curve("perf/train_tokens")])
        rows.append(
            [
                run.name,
                *(_ms(value) for value in (*stages, total)),
                number(tokens) if tokens else "–",
            ]
        )
        totals.append((run, total or 0.0))
    heads = ["run", *(f"{words}, ms" for _, words in STAGES), "step, ms", "tokens in the forward"]
    compared = [(run.name, total, _against_full(run, total, totals)) for run, total in totals]
    note = "median over the steps; full: the same study's run that trains every token"
    chart = figure("Time of a step", bars("time of a step", compared[:16], labels=230), note)
    parts = [table(heads, rows, numeric=range(1, 8)), chart if len(compared) > 1 else ""]
    return "".join([*parts, _memory(runs)])


def _against_full(run: Run, total: float, totals: Sequence[tuple[Run, float]]) -> str:
    """Milliseconds, and the ratio to the `full` run of the same study or of the same folder."""
    for other, seconds in totals:
        if (
            other.config.get("selector") == "full"
            and other.path.parent == run.path.parent
            and seconds
        ):
            return f"{1000 * total:.0f} ms, {total / seconds:.2f} of full"
    return f"{1000 * total:.0f} ms"


def _memory(runs: Sequence[Run]) -> str:
    """Peak memory, where a run logged it."""
    rows = [
        [run.name, f"{max(v for _, v in points):,.0f}"]
        for run in runs
        if (points := run.curve("perf/peak_memory_mib"))
    ]
    return table(["run", "peak memory, MiB"], rows, numeric=(1,)) if rows else ""


def median(values: Sequence[float]) -> float | None:
    """The middle value, None of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{1000 * value:.1f}"
