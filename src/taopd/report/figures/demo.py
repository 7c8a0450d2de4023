"""The demo's table and picture, from its `results.json` alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.table import Table

from taopd.experiments.study.statistics import wilson
from taopd.report.console import arms_table
from taopd.report.figures import style as drawing
from taopd.report.figures.style import MARKERS
from taopd.report.generated_part import markdown_table
from taopd.runs.shares import per_cent

GREY = "#6B6B6B"
COLORS = (*drawing.COLORS[:3], GREY, *drawing.COLORS[3:])
"""The fourth arm, random tokens, is grey."""
STYLES = ("-", "--", "-", ":", "-.", "--", ":", "-.")
"""Line styles and markers also differ, so that the picture survives black and white."""
HATCHES = {"digit": "", "marker": "///", "end": "...", "other": "xx"}
KIND_COLORS = {"digit": "#0072B2", "marker": "#E69F00", "end": GREY, "other": "#CC79A7"}


Groups = dict[str, list[dict[str, Any]]]


def by_arm(results: dict[str, Any]) -> Groups:
    """Outcomes grouped by the arm's name, one entry per seed, in order of appearance."""
    groups: Groups = {}
    for outcome in results["arms"]:
        groups.setdefault(outcome["name"], []).append(outcome)
    return groups


def interval(accuracies: Iterable[float], num_prompts: int) -> tuple[float, float, float]:
    """Mean, low and high: over prompts (Wilson, 95 %) for one seed, smallest and largest of several."""
    values = list(accuracies)
    mean = sum(values) / len(values)
    if len(values) > 1:
        return mean, min(values), max(values)
    return mean, *wilson(mean, num_prompts)


def interval_words(results: dict[str, Any]) -> str:
    """What the intervals of these results are."""
    seeds = {outcome["seed"] for outcome in results["arms"]}
    prompts = results["arms"][0]["num_test_prompts"]
    if len(seeds) > 1:
        return f"smallest and largest of {len(seeds)} seeds, {prompts} held-out prompts"
    return f"95 % interval over {prompts} held-out prompts, one seed"


def table(results: dict[str, Any]) -> Table:
    """One row per arm: accuracy at its best step and at the end, and what it kept, in %."""
    first = results["arms"][0]
    shown = arms_table(
        ("best @step", "end, greedy", "sampled", "kept", "digits"),
        title=f"{results['task']}: held-out accuracy in % over {first['steps']} steps "
        f"(student before: {per_cent(results['base_accuracy'])})",
        caption=f"In brackets: {interval_words(results)}.",
    )
    for name, outcomes in by_arm(results).items():
        best, step = best_point(outcomes)
        shown.add_row(name, f"{per_cent(best)} @{step}", *_at_the_end(outcomes))
    return shown


def _at_the_end(outcomes: list[dict[str, Any]]) -> list[str]:
    """Cells of an arm: greedy and sampled accuracy, what it kept, and the digits of it, in %."""
    prompts = outcomes[0]["num_test_prompts"]
    names = ("accuracy_greedy", "accuracy_sampled")
    ends = [interval((outcome[name] for outcome in outcomes), prompts) for name in names]
    shares = _mean(outcomes, "kept_fraction"), _share(outcomes, "digit")
    return [*map(_percent, ends), *(per_cent(share, 0) for share in shares)]


def best_point(outcomes: list[dict[str, Any]]) -> tuple[float, int]:
    """Largest mean greedy accuracy over seeds, and the first step that reaches it."""
    curves = [dict(map(tuple, outcome["accuracy_curve"])) for outcome in outcomes]
    means = {step: sum(curve[step] for curve in curves) / len(curves) for step in curves[0]}
    step = max(means, key=lambda step: (means[step], -step))
    return means[step], step


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `accuracy.png` and `.svg`: accuracy over steps by arm, and what each selector kept.

    Up to four arms share one panel; more get a panel each, with every seed as a thin line.
    """
    groups = by_arm(results)
    figure = _one_panel(results, groups) if len(groups) <= 4 else _panel_each(results, groups)
    return drawing.save(figure, folder, "accuracy")


def _one_panel(results: dict[str, Any], groups: Groups):
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(1.7, 1), layout="constrained"
    )
    # The arm that ends highest lies on top: at 100 % nothing may hide it.
    ends = sorted(groups, key=lambda name: _mean(groups[name], "accuracy_greedy"))
    for index, (name, outcomes) in enumerate(groups.items()):
        _curve(left, outcomes, index, label=name, above=ends.index(name))
    _frame(left, results)
    left.annotate(
        "student before",
        (left.get_xlim()[1], results["base_accuracy"]),
        ha="right",
        va="bottom",
        color="#666666",
        fontsize=8,
    )
    left.set(xlabel="optimizer step", ylabel="held-out greedy accuracy")
    left.set_title(f"{results['task']}\nband: {interval_words(results)}", fontsize=9, loc="left")
    figure.legend(loc="outside upper center", ncols=len(groups), frameon=False, fontsize=9)
    _kinds(right, groups)
    return figure


def _panel_each(results: dict[str, Any], groups: Groups):
    rows = (len(groups) + 3) // 4
    figure = plt.figure(figsize=(14, 2.6 * rows + 0.6), layout="constrained")
    curves, bars = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    panels = curves.subplots(rows, 4, sharex=True, sharey=True, squeeze=False).flatten()
    for index, (name, outcomes) in enumerate(groups.items()):
        axes = panels[index]
        for outcome in outcomes:
            axes.plot(*zip(*outcome["accuracy_curve"], strict=True), color="#999999", linewidth=0.8)
        _curve(axes, outcomes, index, label=None)
        _frame(axes, results)
        axes.set_title(name, fontsize=9, loc="left")
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    title = (
        f"{results['task']}: held-out greedy accuracy over steps; band: {interval_words(results)}"
    )
    curves.suptitle(title, fontsize=9, x=0.01, ha="left")
    _kinds(bars.subplots(), groups)
    return figure


def _frame(axes, results: dict[str, Any]) -> None:
    axes.axhline(results["base_accuracy"], color="#999999", linewidth=1, zorder=0)
    axes.set_ylim(-0.04, 1.06)


def _curve(
    axes, outcomes: list[dict[str, Any]], index: int, *, label: str | None, above: int = 0
) -> None:
    steps = [step for step, _ in outcomes[0]["accuracy_curve"]]
    prompts = outcomes[0]["num_test_prompts"]
    points = [
        interval((outcome["accuracy_curve"][i][1] for outcome in outcomes), prompts)
        for i in range(len(steps))
    ]
    means, lows, highs = zip(*points, strict=True)
    look = index % len(COLORS)
    axes.plot(
        steps,
        means,
        STYLES[look],
        marker=MARKERS[look],
        markersize=4,
        color=COLORS[look],
        label=label,
        zorder=2 + 0.01 * above,
    )
    axes.fill_between(steps, lows, highs, color=COLORS[look], alpha=0.15, linewidth=0)


def _kinds(axes, groups: Groups) -> None:
    """Stacked bars: share of the kept tokens by kind."""
    names = list(groups)
    left = [0.0] * len(names)
    for kind in KIND_COLORS:
        widths = [_share(outcomes, kind) for outcomes in groups.values()]
        if not any(widths):
            continue
        axes.barh(
            names,
            widths,
            left=left,
            color=KIND_COLORS[kind],
            hatch=HATCHES[kind],
            edgecolor="white",
            label=kind,
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="share of the kept tokens", xlim=(0, 1))
    axes.set_title("what was kept, all steps", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _percent(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{per_cent(mean)} [{100 * low:.0f},{100 * high:.0f}]"


def _mean(outcomes: list[dict[str, Any]], name: str) -> float:
    return sum(outcome[name] for outcome in outcomes) / len(outcomes)


def _share(outcomes: list[dict[str, Any]], kind: str) -> float:
    """Share of the kept tokens of this kind, mean over seeds."""
    shares = [outcome["selected_share_by_kind"].get(kind, 0.0) for outcome in outcomes]
    return sum(shares) / len(shares)


def markdown(results: dict[str, Any]) -> str:
    """The table of `table`, with the interval at the best step too, as Markdown."""
    heads = ("arm", "best step", "accuracy there", "end, greedy", "end, sampled")
    rows = []
    for name, outcomes in by_arm(results).items():
        _, step = best_point(outcomes)
        peak = [dict(map(tuple, outcome["accuracy_curve"]))[step] for outcome in outcomes]
        best = _percent(interval(peak, outcomes[0]["num_test_prompts"]))
        *ends, kept, digits = _at_the_end(outcomes)
        rows.append([name, str(step), best, *ends, f"{kept} %", f"{digits} %"])
    lines = markdown_table((*heads, "kept", "of it digits"), rows)
    note = (
        f"{results['task']}, {results['arms'][0]['steps']} steps, accuracy in %, student before "
        f"{per_cent(results['base_accuracy'])}. In brackets: {interval_words(results)}."
    )
    return "\n".join([*lines, "", note, ""])
