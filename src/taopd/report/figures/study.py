"""A study as one picture: accuracy over steps, a panel per arm. `taopd report` draws budget and cost.

Drawn from `results.json` alone. The picture says how many seeds it shows.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from taopd.report.figures.style import COLORS, headed, save
from taopd.report.study_table import seeds_words
from taopd.report.text import shortened

_COLUMNS = 4
_MAX_TITLE = 38
_MOST_PANELS = 160
"""A picture may have 65,536 pixels a side."""


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `accuracy.png` and `.svg`; returns the paths.

    Every seed is a thin line with the mean on top, and the mean of full distillation behind.
    """
    metric = results["question"]["metric"]
    key = "accuracy_curve" if metric == "greedy" else "accuracy_sampled_curve"
    curves: dict[str, list[np.ndarray]] = {arm["name"]: [] for arm in results["arms"]}
    for outcome in results["outcomes"]:
        curves[outcome["name"]].append(np.asarray(outcome[key], dtype=float) * [1, 100])
    full = next((arm["name"] for arm in results["arms"] if arm["selector"] == "full"), None)
    of_full = curves[full] if full is not None else []
    total, curves = len(curves), dict(list(curves.items())[:_MOST_PANELS])
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.1 * columns + 0.4, 2.3 * rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, seeds) in zip(axes.flatten(), curves.items(), strict=False):
        if full is not None and name != full:
            panel.plot(*_mean(of_full), color="#555555", linestyle=":", linewidth=1.2)
        for curve in seeds:
            panel.plot(*curve.T, color="#BBBBBB", linewidth=0.8)
        panel.plot(*_mean(seeds), color=COLORS[0], linewidth=1.8)
        panel.axhline(100 * results["arms"][0]["base_accuracy"], color="#999999", linewidth=0.6)
        panel.set_title(shortened(name, _MAX_TITLE), fontsize=9, loc="left", parse_math=False)
        panel.set_ylim(-2, 102)
    for index, panel in enumerate(axes.flatten()):
        panel.set_visible(index < len(curves))
        panel.tick_params(labelbottom=index + columns >= len(curves))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel(f"{metric} accuracy, %", fontsize=10)
    words = f"{results['title']}: mean of {seeds_words(results)} (thick), seeds (thin)"
    more = f", {full} (dotted)" if full else ""
    more += f"; the first {len(curves)} of {total} arms" if len(curves) < total else ""
    headed(figure, f"{words}{more}, student before (gray)")
    return save(figure, folder, "accuracy")


def _mean(curves: list[np.ndarray]) -> np.ndarray:
    """[2, points], over the steps at which every seed was evaluated."""
    at = [dict(curve.tolist()) for curve in curves]
    steps = sorted(set.intersection(*map(set, at)))
    return np.array([steps, [np.mean([curve[step] for curve in at]) for step in steps]])
