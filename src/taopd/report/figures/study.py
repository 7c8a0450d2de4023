"""A study as pictures: accuracy over steps, by budget, by cost, and the paired differences.

Drawn from `results.json` and `timings.json` alone. Every picture says its n and what its bars are; series
differ in marker and line style as well as in color.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from taopd.report.figures.style import COLORS, MARKERS, STYLES, save
from taopd.report.study_table import equal_words, seeds_words, significant

_COLUMNS = 4
_LEGEND_COLUMNS = 4
Seeds = list[dict[str, Any]]


def draw(results: dict[str, Any], timings: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write accuracy, differences, budget and cost as .png and .svg; returns the paths."""
    groups = _groups(results)
    paths = save(_accuracy(results, groups), folder, "accuracy")
    if results["comparisons"]:
        paths += save(_differences(results), folder, "differences")
    if len({arm["budget"] for arm in results["arms"] if arm["selector"] != "full"}) > 1:
        paths += save(_budget(results), folder, "budget")
    cost = _cost(results, groups, timings)
    return paths + (save(cost, folder, "cost") if cost is not None else [])


def _groups(results: dict[str, Any]) -> dict[str, Seeds]:
    groups: dict[str, Seeds] = {arm["name"]: [] for arm in results["arms"]}
    for outcome in results["outcomes"]:
        groups[outcome["name"]].append(outcome)
    return groups


def _curve(outcome: dict[str, Any], metric: str) -> np.ndarray:
    name = "accuracy_curve" if metric == "greedy" else "accuracy_sampled_curve"
    return np.asarray(outcome[name], dtype=float)


def _mean_curve(outcomes: Seeds, metric: str) -> np.ndarray:
    """[points, 2] over the points that every seed has."""
    curves = [_curve(outcome, metric) for outcome in outcomes]
    length = min(len(curve) for curve in curves)
    return np.mean([curve[:length] for curve in curves], axis=0)


def _look(index: int) -> dict[str, Any]:
    """Colors come round after seven; marker and style are then shifted against them."""
    turn = index // len(COLORS)
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[(index + turn) % len(STYLES)],
        "marker": MARKERS[(index + 2 * turn) % len(MARKERS)],
        "markersize": 4,
    }


def _accuracy(results: dict[str, Any], groups: dict[str, Seeds]) -> Any:
    """A panel per arm: every seed as a thin line, the mean on top, the full arm's mean behind."""
    metric = results["question"]["metric"]
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.1 * columns + 0.4, 2.3 * rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    full = next((arm["name"] for arm in results["arms"] if arm["selector"] == "full"), None)
    for index, (name, outcomes) in enumerate(groups.items()):
        panel = axes.flatten()[index]
        if full is not None and name != full:
            mean = _mean_curve(groups[full], metric)
            panel.plot(mean[:, 0], 100 * mean[:, 1], color="#555555", linestyle=":", linewidth=1.2)
        for outcome in outcomes:
            curve = _curve(outcome, metric)
            panel.plot(curve[:, 0], 100 * curve[:, 1], color="#BBBBBB", linewidth=0.8)
        mean = _mean_curve(outcomes, metric)
        panel.plot(mean[:, 0], 100 * mean[:, 1], color=COLORS[0], linewidth=1.8)
        panel.axhline(100 * results["arms"][0]["base_accuracy"], color="#999999", linewidth=0.6)
        panel.set_title(_short(name), fontsize=9, loc="left")
        panel.set_ylim(-2, 102)
    for index, panel in enumerate(axes.flatten()):
        panel.set_visible(index < len(groups))
        panel.tick_params(labelbottom=index + columns >= len(groups))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel(f"{metric} accuracy, %", fontsize=10)
    words = f"{results['title']}: mean of {seeds_words(results)} (thick), seeds (thin)"
    more = f", {full} (dotted), student before (gray)" if full else ", student before (gray)"
    figure.suptitle(words + more, fontsize=9, x=0.01, ha="left")
    return figure


def _differences(results: dict[str, Any]) -> Any:
    """Paired differences with intervals; filled where told apart from zero."""
    kinds = [k for k in ("full", "random") if any(r["to"] == k for r in results["comparisons"])]
    names = [arm["name"] for arm in results["arms"]]
    names = [n for n in names if any(row["arm"] == n for row in results["comparisons"])]
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(4.2 * len(kinds) + 1.6, 0.34 * len(names) + 1.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, kind in zip(axes[0], kinds, strict=True):
        for row in (row for row in results["comparisons"] if row["to"] == kind):
            place, value = names.index(row["arm"]), 100 * row["difference"]
            if row["low"] is not None:
                ends = [max(-100, 100 * row["low"]), min(100, 100 * row["high"])]
                panel.plot(ends, [place, place], color="#333333")
            face = COLORS[0] if significant(row) else "white"
            panel.plot(value, place, marker="o", color=COLORS[0], markerfacecolor=face, zorder=3)
        panel.axvline(0, color="#999999", linewidth=1)
        panel.grid(axis="x", color="#EEEEEE")
        panel.set(yticks=range(len(names)), yticklabels=[_short(name) for name in names])
        panel.set_xlabel(f"points above {'its random control' if kind == 'random' else 'full'}")
        panel.margins(y=0.06)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        f"{results['title']}, {seeds_words(results)}, {equal_words(results)}\n"
        "bars: 95 % paired t intervals, cut at 100 points; filled: p < 0.05 after Holm's correction",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def _budget(results: dict[str, Any]) -> Any:
    """Mean accuracy by budget, a line per selector and further setting; full as a band."""
    metric = results["question"]["metric"]
    figure, panel = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for arm in results["arms"]:
        lines.setdefault(_family(arm), []).append(arm)
    budgets = sorted({arm["budget"] for arm in results["arms"] if arm["selector"] != "full"})
    shown = [family for family in lines if lines[family][0]["selector"] != "full"]
    for index, family in enumerate(shown):
        arms = sorted(lines[family], key=lambda arm: arm["budget"])
        # Beside each other, so that intervals do not hide each other.
        places = [100 * a["budget"] * 1.03 ** (index - (len(shown) - 1) / 2) for a in arms]
        means = [100 * arm[metric]["mean"] for arm in arms]
        ends = [_spans(arm[metric]) for arm in arms]
        panel.errorbar(
            places, means, yerr=np.transpose(ends), capsize=2, label=family, **_look(index)
        )
    for arm in (arm for arm in results["arms"] if arm["selector"] == "full"):
        cell = arm[metric]
        panel.axhline(100 * cell["mean"], color="#000000", linewidth=1, label=_short(arm["name"]))
        if cell["low"] is not None:
            below, above = _spans(cell)
            mean = 100 * cell["mean"]
            panel.axhspan(mean - below, mean + above, color="#000000", alpha=0.07)
    base = 100 * results["arms"][0]["base_accuracy"]
    panel.axhline(base, color="#999999", linestyle=":", linewidth=1, label="student before")
    panel.set_xscale("log")
    panel.set_xticks([100 * b for b in budgets], [f"{100 * b:g}" for b in budgets])
    panel.minorticks_off()
    panel.set(xlabel="budget, % of the completion tokens", ylabel=f"{metric} accuracy, %")
    panel.set_ylim(-2, 102)
    words = f"{results['title']}, {equal_words(results)}; bars and band: 95 % t intervals over "
    panel.set_title(f"{words}{seeds_words(results)}", fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)
    return figure


def _cost(
    results: dict[str, Any], groups: dict[str, Seeds], timings: Sequence[dict[str, Any]]
) -> Any:
    """Mean accuracy against kept tokens and against seconds; None if neither was recorded."""
    metric = results["question"]["metric"]
    seconds = {
        (entry["name"], entry["seed"]): entry["train_seconds_curve"]
        for entry in timings
        if "train_seconds_curve" in entry
    }
    tokens = {
        (o["name"], o["seed"]): o["selected_tokens_curve"]
        for o in results["outcomes"]
        if "selected_tokens_curve" in o
    }
    panels = [
        (label, curves)
        for label, curves in (("selected tokens", tokens), ("seconds of training", seconds))
        if len(curves) == len(results["outcomes"])
    ]
    if not panels:
        return None
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.2 * len(panels), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (label, curves) in zip(axes[0], panels, strict=True):
        for index, (name, outcomes) in enumerate(groups.items()):
            mean = _mean_curve(outcomes, metric)
            own = [
                np.asarray(curves[name, outcome["seed"]])[: len(mean), 1] for outcome in outcomes
            ]
            first = 1 if label.startswith("selected") else 0  # log axis: nothing at 0
            style = _look(index) | {"markersize": 3}
            legend = _short(name) if panel is axes[0][0] else None
            x = np.mean(own, axis=0)
            panel.plot(x[first:], 100 * mean[first:, 1], label=legend, linewidth=1, **style)
        if label.startswith("selected"):
            panel.set_xscale("log")
        panel.set_xlabel(f"{label}, mean over seeds")
        panel.set_ylim(-2, 102)
    axes[0][0].set_ylabel(f"{metric} accuracy, %")
    figure.suptitle(
        f"{results['title']}: accuracy against cost, mean of {seeds_words(results)}; "
        "evaluation is not counted",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.legend(loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)
    return figure


def _family(arm: dict[str, Any]) -> str:
    """The arm's name without its budget."""
    return _short(arm["name"].replace(f"@{100 * arm['budget']:g}%", ""))


def _short(name: str, limit: int = 38) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _spans(cell: dict[str, Any]) -> tuple[float, float]:
    if cell["low"] is None:
        return 0.0, 0.0
    low, high = max(0.0, cell["low"]), min(1.0, cell["high"])
    return 100 * (cell["mean"] - low), 100 * (high - cell["mean"])
