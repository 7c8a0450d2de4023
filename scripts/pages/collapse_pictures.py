"""Pictures of the long runs: curves, mechanism, single changes, frontier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from taopd.report.figures.style import COLORS, MARKERS, STYLES, plt

Part = dict[str, Any]
LOOKS = {
    name: {"color": COLORS[i], "linestyle": STYLES[i], "marker": MARKERS[i]}
    for i, name in enumerate(("anchored", "published", "C-only", "full"))
}
PANELS = (
    ("greedy", "greedy accuracy", "linear"),
    ("kept_disagreement", "D of the selected, nats", "symlog"),
    ("drift", "drift of the unselected, nats", "symlog"),
    ("drift_end", "drift of the end token, nats", "symlog"),
    ("update_norm", "norm of an update", "linear"),
    ("derailed", "D·C behind a rare token, share", "linear"),
)


def _band(axes: Any, steps: list[int], seeds: list[list[float]], name: str) -> None:
    values = 100 * np.asarray(seeds)
    look = LOOKS[name]
    every = max(1, len(steps) // 6)
    axes.plot(steps, values.mean(0), label=name, markevery=every, markersize=4, **look)
    axes.fill_between(
        steps, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0
    )


def _save(figure: Any, folder: Path, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_curves(parts: list[Part], folder: Path) -> None:
    """Greedy accuracy over 1,000 steps, one panel a variant, budget 10 %."""
    figure, panels = plt.subplots(1, len(parts), figsize=(2.7 * len(parts), 3.0), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        for name in LOOKS:
            key = name if name == "full" else f"{name}@0.1"
            _band(axes, part["steps"], part["arms"][key]["greedy"], name)
        axes.set_title(part["variant"], size=10)
        axes.set_xlabel("step")
    panels[0].set_ylabel("greedy accuracy, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.suptitle("Budget 10 %, exact reverse KL, bands: smallest and largest seed", size=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    _save(figure, folder, "curves")


def draw_mechanism(part: Part, folder: Path) -> None:
    """What moves first: six numbers over the steps, means of the seeds."""
    figure, panels = plt.subplots(2, 3, figsize=(10.5, 5.6), sharex=True)
    arms = {"anchored": "anchor", "published": "published", "C-only": "C-only", "full": "full"}
    for axes, (column, words, scale) in zip(panels.flat, PANELS, strict=True):
        for name, key in arms.items():
            arm = part["arms"][key]
            if column == "greedy":
                _band(axes, part["steps"], arm["greedy"], name)
                continue
            values = [np.nan if v is None else v for v in arm["trace"][column]]
            axes.plot(
                arm["trace"]["step"], values, label=name, markevery=6, markersize=4, **LOOKS[name]
            )
        if scale == "symlog":
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=0)
        axes.set_title(words, size=9)
    for axes in panels[1]:
        axes.set_xlabel("step")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"{part['variant']}, budget 10 %, means of three seeds", size=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _save(figure, folder, "mechanism")


def draw_causes(parts: list[Part], folder: Path) -> None:
    """Accuracy at the end of every single change, sorted by the mean of both variants."""
    names = sorted(
        parts[0]["arms"],
        key=lambda name: sum(
            np.mean([row[-1] for row in part["arms"][name]["greedy"]]) for part in parts
        ),
    )
    figure, panels = plt.subplots(
        1, len(parts), figsize=(9.5, 0.8 + 0.27 * len(names)), sharey=True
    )
    places = np.arange(len(names))
    for axes, part in zip(panels, parts, strict=True):
        ends = [
            100 * np.asarray([row[-1] for row in part["arms"][name]["greedy"]]) for name in names
        ]
        for place, name, seeds in zip(places, names, ends, strict=True):
            index = 0 if name.startswith("anchor") else (1 if name == "published" else 6)
            axes.plot(
                [seeds.min(), seeds.max()], [place, place], color=COLORS[index], linewidth=1.2
            )
            axes.plot(
                seeds.mean(),
                place,
                linestyle="none",
                color=COLORS[index],
                marker=MARKERS[(0, 1, 2)[min(index, 2)]],
                markersize=6,
            )
        axes.set_title(part["variant"], size=10)
        axes.set_xlim(-3, 103)
        axes.grid(axis="y", alpha=0.25)
        axes.set_xlabel("greedy accuracy at step 400, %")
    panels[0].set_yticks(places, names, size=8)
    figure.suptitle(
        "One change at a time, budget 10 %; bar: smallest and largest of three seeds", size=10
    )
    figure.tight_layout()
    _save(figure, folder, "causes")


def draw_frontier(
    parts: list[Part], folder: Path, trained: Callable[[str, dict[str, Any]], float]
) -> None:
    """Accuracy against the share of trained tokens: hollow at step 100, filled at the end."""
    figure, panels = plt.subplots(1, len(parts), figsize=(2.7 * len(parts), 3.1), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        at_100 = part["steps"].index(100)
        for key, arm in part["arms"].items():
            name = key.split("@")[0]
            greedy = 100 * np.asarray(arm["greedy"])
            x = 100 * trained(key, arm)
            look = {"color": LOOKS[name]["color"], "marker": LOOKS[name]["marker"]}
            early, late = greedy[:, at_100].mean(), greedy[:, -1].mean()
            axes.plot([x, x], [early, late], color=look["color"], linewidth=0.8, linestyle=":")
            axes.plot(x, early, fillstyle="none", linestyle="none", **look)
            label = name if key in (f"{name}@0.1", "full") else None
            axes.plot(x, late, linestyle="none", label=label, **look)
        axes.set_xscale("log")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_title(part["variant"], size=10)
        axes.set_xlabel("trained tokens, %")
    panels[0].set_ylabel("greedy accuracy, %")
    panels[0].set_ylim(-4, 104)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.suptitle("Hollow: step 100. Filled: step 1,000. Means of five seeds", size=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    _save(figure, folder, "frontier")
