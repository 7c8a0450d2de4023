"""A study at several learning rates as one picture: final accuracy against the rate, one color per arm.

Drawn from `results.json` alone. The picture says how many seeds it shows.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from taopd.experiments.study.own_best import at_rate
from taopd.report.figures.style import COLORS, MARKERS, STYLES, headed, save
from taopd.report.study_table import seeds_words


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `rates.png` and `.svg`; returns the paths.

    A line is the mean over seeds, a small dot a seed, a ring the arm's best rate.
    """
    found, metric = results["rates"], results["question"]["metric"]
    seeds: dict[str, list[float]] = {}
    for outcome in results["outcomes"]:
        seeds.setdefault(outcome["name"], []).append(100 * outcome[f"accuracy_{metric}"])
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for index, arm in enumerate(found["arms"]):
        color = COLORS[index % len(COLORS)]
        look = {"color": color, "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        rates = [rate for rate, _ in arm["curve"]]
        means = [100 * mean for _, mean in arm["curve"]]
        line = STYLES[index // len(COLORS) % len(STYLES)]
        # To matplotlib a label that begins with a low line is none.
        label = f" {arm['name']}" if arm["name"].startswith("_") else arm["name"]
        axes.plot(rates, means, linestyle=line, label=label, **look)
        for rate in rates:
            own = seeds.get(at_rate(arm["name"], rate), [])
            axes.plot([rate] * len(own), own, ".", color=color, alpha=0.5, markersize=4)
        best = {"markersize": 11, "fillstyle": "none", "color": color}
        axes.plot(arm["best_rate"], 100 * arm["best"], "o", **best)
    axes.set_xscale("log")
    axes.set_xticks(found["rates"], [f"{rate:g}" for rate in found["rates"]])
    axes.minorticks_off()
    axes.axhline(100 * results["arms"][0]["base_accuracy"], color="#999999", linewidth=0.6)
    axes.set(xlabel="learning rate", ylabel=f"{metric} accuracy, %")
    legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    words = f"mean of {seeds_words(results)} (line), seeds (dots), own best (ring), student before (gray)"
    headed(figure, f"{results['title']}\n{words}")
    return save(figure, folder, "rates")
