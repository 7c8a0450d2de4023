"""Metrics over the training steps, and what the steps cost."""

import math
import statistics
from collections.abc import Mapping, Sequence

from taopd.report.charts import Series, areas, figure, key, lines, number
from taopd.report.folders import Run
from taopd.report.row_charts import bars
from taopd.report.sections.tables import first_of, table
from taopd.runs.limits import DRIFT_WARN, TRUNCATED, compatibility_words, entropy_unit
from taopd.runs.signal_names import QUADRANTS
from taopd.trainer.watches.collapse_detector import DRIFT_LIMIT

LEAD = "Metrics of every logging step; averaged where there are more points than pixels."
SPEED_LEAD = (
    "Time and memory of a step by stage, compared with training on every token. Stages and step: wall time, "
    "which depends on what else the machine did; CPU time (logged without a GPU) does not."
)
MAX_RUNS = 8
MOST_OWN = 4
"""Runs that have charts of their own."""
MOST_BARS = 16
CHARTS = (
    ("Distillation loss", "loss/selected_nats", "nats"),
    ("Kept share of the tokens", "select/kept_fraction", "%"),
    ("Disagreement D, mean", "signal/disagreement_nats/mean", "nats"),
    ("Compatibility C, mean", "signal/compatibility/mean", "0 to 1"),
    ("Student's entropy H, mean", "signal/entropy_nats/mean", "nats"),
    ("Learnable disagreement, mean", "signal/teachability/mean", "0 to 1"),
    ("D of the kept tokens", "select/kept_disagreement_nats", "nats"),
    ("C of the kept tokens", "select/kept_compatibility", "0 to 1"),
    ("Completion length", "completions/mean_length", "tokens"),
    ("Size of the update", "update/norm", "L2"),
)
GUARDS = (
    ("Drift of the tokens that nobody teaches", "guard/idle_drift_nats", "nats", DRIFT_LIMIT),
    ("Anchor: KL to the reference model", "loss/anchor_nats", "nats", None),
    (
        "Log-probs: sampler against scoring pass",
        "rollout/drift_nats/mean",
        "nats a token",
        DRIFT_WARN,
    ),
    ("Truncated completions", "completions/clipped_ratio", "%", 100 * TRUNCATED),
    ("Gain on the bank", "bank/gain_forward_nats/mean", "nats", None),
)
"""Metrics of stability: title, key, unit, and the limit at which a run warns."""
GUARD_WORDS = (
    "Drift: how far the unselected tokens moved away from the reference model (the initial student) without "
    "moving towards the teacher. A level line is the limit at which a run warns."
)
TEACHER_CHARTS = (
    ("Valid tokens", "teacher/valid_tokens", "tokens"),
    ("Kept share of the tokens", "teacher/kept_fraction", "%"),
    ("Disagreement D, mean", "teacher/disagreement_nats", "nats"),
    ("Compatibility C, mean", "teacher/compatibility", "0 to 1"),
)
"""Title, key without the teacher's name, and unit."""
STAGES = (
    ("perf/sample_s", "sample"),
    ("perf/score_s", "score"),
    ("perf/select_s", "select"),
    ("perf/anchor_s", "anchor"),
    ("perf/train_s", "train"),
)
ONCE_A_BATCH = ("perf/sample_s", "perf/score_s", "perf/select_s", "perf/anchor_s")
"""Stages of a generation batch, whatever the number of steps on it."""


def body(runs: Sequence[Run]) -> str:
    """Small charts of one metric each, all runs in every chart; then guards and quadrants."""
    logged = [run for run in runs if run.metrics][:MAX_RUNS]
    charts = [chart for one in CHARTS if (chart := _chart(logged, *one))]
    guards = [chart for *one, limit in GUARDS if (chart := _chart(logged, *one, limit=limit))]
    if not charts and not guards:
        return ""
    legend = key([(run.name, run.color) for run in logged]) if len(logged) > 1 else ""
    every = len([run for run in runs if run.metrics])
    parts = [
        first_of(len(logged), every, "runs"),
        legend,
        f'<div class="grid">{"".join(charts)}</div>',
    ]
    if guards:
        parts.append(f'<h3>Stability</h3><p class="note">{GUARD_WORDS}</p>')
        parts.append(f'{legend}<div class="grid">{"".join(guards)}</div>')
    by_teacher = [chart for run in logged[:MOST_OWN] for chart in _by_teacher(run)]
    if by_teacher:
        parts.append("<h3>By teacher</h3>" + first_of(min(every, MOST_OWN), every, "runs"))
        parts.append(f'<div class="grid">{"".join(by_teacher)}</div>')
    quadrants = [_quadrants(run) for run in logged[:MOST_OWN]]
    if any(quadrants):
        parts.append("<h3>Quadrants of entropy H and disagreement D, share of the tokens, %</h3>")
        words = ", ".join(f"Q{number}: {words}" for number, words in QUADRANTS.items())
        parts.append(f'<p class="note">{words}; high is at the median of the batch or above.</p>')
        parts.append(first_of(min(every, MOST_OWN), every, "runs"))
        parts.append(f'<div class="grid">{"".join(quadrants)}</div>')
    return "".join(parts)


def _chart(
    runs: Sequence[Run], title: str, name: str, unit: str, *, limit: float | None = None
) -> str:
    """One metric of all runs; nothing where none logged it, or a watched one hardly moved."""
    series = [
        _series(run.name, points, run.color, unit) for run in runs if (points := run.curve(name))
    ]
    largest = max((abs(y) for one in series for _, y in one.points), default=0.0)
    # A chart of a metric that stays far below its limit, or at 0, shows nothing.
    watched = {name for _, name, *_ in GUARDS}
    if not series or (name in watched and largest <= 0.01 * (limit or 0.0)):
        return ""
    return figure(title, lines(title, series, limit=limit), _unit(runs, name, unit))


def _unit(runs: Sequence[Run], name: str, unit: str) -> str:
    """The unit of a metric, and what is named so in these runs, as far as they say: C, and a loss."""
    if "entropy" in name:
        return " or ".join(
            dict.fromkeys(entropy_unit(str(run.config.get("signals"))) for run in runs)
        )
    words: list[str] = []
    if "compatibility" in name:
        words = [str(run.config.get("compatibility") or "") for run in runs]
        words = [compatibility_words(one) for one in words if one]
    elif name == "loss/selected_nats":
        words = [_loss_words(run) for run in runs]
    return "; ".join([unit, *dict.fromkeys(filter(None, words))])


def _loss_words(run: Run) -> str:
    """What the distillation loss is a mean of; empty where the run does not say."""
    if run.config.get("denominator") == "completion":
        return "the kept tokens' loss over all tokens"
    kept = "mean of the kept tokens"
    words = {"reach": "with the held tokens", "anchored": kept, "published": kept}
    return words.get(str(run.config.get("method")), "")


def _series(label: str, points: Sequence[tuple[float, float]], color: int, unit: str) -> Series:
    factor = 100.0 if unit == "%" else 1.0
    return Series(label=label, points=[(x, factor * y) for x, y in points], color=color)


def _by_teacher(run: Run) -> list[str]:
    """Charts of a run with several teachers, one line for each; nothing of a run with one."""
    first = "teacher/valid_tokens/"
    names = sorted(
        {key.removeprefix(first) for line in run.metrics for key in line if key.startswith(first)}
    )
    charts = []
    for title, name, unit in TEACHER_CHARTS:
        curves = [(teacher, run.curve(f"{name}/{teacher}")) for teacher in names[:MAX_RUNS]]
        known = [(teacher, points) for teacher, points in curves if points]
        series = [_series(*one, index, unit) for index, one in enumerate(known)]
        if series:
            words = f"{title}, {run.name}"
            legend = key([(one.label, one.color) for one in series])
            legend += first_of(len(curves), len(names), "teachers")
            unit = _unit([run], name, unit)
            charts.append(figure(words, legend + lines(words, series), unit))
    return charts


def _quadrants(run: Run) -> str:
    curves = [
        (f"Q{q}: {words}", run.curve(f"select/quadrant_q{q}")) for q, words in QUADRANTS.items()
    ]
    if len({len(points) for _, points in curves}) > 1 or not curves[0][1]:
        return ""
    series = [
        Series(label=words, points=points, color=index)
        for index, (words, points) in enumerate(curves)
    ]
    return figure(run.name, areas(f"quadrants of {run.name}", series))


def speed(runs: Sequence[Run]) -> str:
    """A table of time by stage and of memory per run, and bars of both against the `full` run."""
    timed = [run for run in runs if run.curve("step_time")]
    if not timed:
        return ""
    walls, busy = (
        {run.name: median(_of_steps(run, name)) for run in timed}
        for name in ("step_time", "perf/cpu_s")
    )
    # One kind of time for all: a wall time beside a CPU time would be no comparison.
    by_cpu = None not in busy.values()
    steps = {name: value or 0.0 for name, value in (busy if by_cpu else walls).items()}
    note = "median over the steps" + (
        "" if by_cpu else "; wall time, compare equally loaded machines"
    )
    peaks = {
        run.name: max(v for _, v in points)
        for run in timed
        if (points := run.curve("perf/peak_memory_mib"))
    }
    rows = []
    for run in timed:
        stages = [median(_of_steps(run, name)) for name, _ in STAGES]
        tokens = median(_of_steps(run, "perf/train_tokens"))
        peak = peaks.get(run.name)
        times = [_ms(value) for value in (*stages, walls[run.name], busy[run.name])]
        rows.append([run.name, *times, _whole(tokens), _whole(peak)])
    heads = ["run", *(f"{words}, ms" for _, words in STAGES), "step, ms"]
    heads += ["CPU time, ms", "forward tokens", "peak, MiB"]
    charts = [
        _against_full(
            "CPU time of a step" if by_cpu else "Time of a step", note, timed, steps, 1000.0, "ms"
        ),
        _against_full("Peak memory", PEAK_WORDS, timed, peaks, 1.0, "MiB"),
    ]
    shown = "".join(charts) if len(timed) > 1 else ""
    return table(heads, rows, numeric=range(1, 10)) + f'<div class="figures grid">{shown}</div>'


PEAK_WORDS = (
    "tensors on the GPU; without one all of the process, libraries and both models included"
)


def _against_full(
    title: str,
    note: str,
    runs: Sequence[Run],
    values: Mapping[str, float],
    factor: float,
    unit: str,
) -> str:
    """Bars, with the ratio to the `full` run of the same study or of the same folder."""
    rows, colors = [], []
    for run in runs:
        value = values.get(run.name)
        if value is None:
            continue
        full = next((values[o.name] for o in runs if _is_full(o, run) and values.get(o.name)), None)
        ratio = "" if full is None else f", {value / full:.2f} of full"
        rows.append((run.name, value, f"{factor * value:,.0f} {unit}{ratio}"))
        colors.append(run.color)
    if not rows:
        return ""
    chart = bars(title, rows[:MOST_BARS], labels=210, colors=colors[:MOST_BARS])
    note += f"; the first {MOST_BARS} of {len(rows)} runs" if len(rows) > MOST_BARS else ""
    return figure(title, chart, note)


def _is_full(other: Run, run: Run) -> bool:
    return other.config.get("selector") == "full" and other.path.parent == run.path.parent


def _of_steps(run: Run, name: str) -> list[float]:
    """Values of a metric for one optimizer step each.

    Several steps on a generation batch differ, as the first one samples it: they count as their mean, and
    what is measured once for all of them is shared out.
    """
    steps = run.config.get("num_iterations")
    if not isinstance(steps, int) or steps < 2:
        return [value for _, value in run.curve(name)]
    batches: dict[int, list[float]] = {}
    for step, value in run.curve(name):
        batches.setdefault(math.ceil(step / steps), []).append(value)
    shared = steps if name in ONCE_A_BATCH else 1
    return [sum(values) / len(values) / shared for values in batches.values()]


def median(values: Sequence[float]) -> float | None:
    """The middle value, of an even number the mean of the two in the middle; None of nothing."""
    return statistics.median(values) if values else None


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{1000 * value:.1f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else number(round(value))
