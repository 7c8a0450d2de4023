"""The leaderboard as a page and a picture, from its JSON alone.

    score of a run   mean of its greedy accuracies at the checkpoints after step 0 (early and late count)
    cell             mean over seeds, with the half-width of a 95 % t interval, and the accuracy at the end
    rank             1 is best; by score within one variant, then averaged over variants

A mark says that the paired difference to full distillation on the same seeds is told apart from zero
(two-sided t, Holm over the selectors of one column).
"""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from taopd.experiments.study.statistics import holm, t_estimate
from taopd.report.generated_part import markdown_table, write_generated

FULL = "full"
LOSS_NAMES = {"reverse_kl": "exact reverse KL", "sampled_reverse_kl": "sampled reverse KL"}
MARGIN = 1.0
"""Points: a selector that loses less than this to full distillation counts as not worse."""

Cells = dict[str, dict[str, dict[str, Any]]]
"""selector -> variant -> cell, of one loss and one budget."""


def scores(cell: dict[str, Any]) -> np.ndarray:
    """Score of every seed, in %."""
    return 100 * np.asarray(cell["greedy"])[:, 1:].mean(axis=1)


def finals(cell: dict[str, Any]) -> np.ndarray:
    """Greedy accuracy of every seed at the last step, in %."""
    return 100 * np.asarray(cell["greedy"])[:, -1]


def select_cells(board: dict[str, Any], loss: str, budget: float) -> Cells:
    """Cells of one loss and budget; what trains every token belongs to every budget."""
    found: Cells = {}
    for cell in board["cells"]:
        if cell["loss"] == loss and cell["budget"] in (budget, 1.0):
            found.setdefault(cell["selector"], {})[cell["variant"]] = cell
    return found


def variants_of(board: dict[str, Any]) -> list[str]:
    """The columns: variants that at least half of the entries have, in the order of the lab's page."""
    order = ["dialect", "bilingual", "reversal", "termination", "fallible", "accent"]
    entries = _entries(board)
    most = max(map(len, entries.values()))
    common = {variant for variant, names in entries.items() if 2 * len(names) >= most}
    return [v for v in order if v in common] + sorted(common - set(order))


def left_out(board: dict[str, Any]) -> str:
    """The variants that are no columns, with how many entries have them; empty if there is none."""
    shown, entries = variants_of(board), _entries(board)
    few = [f"*{name}* ({len(entries[name])})" for name in sorted(entries) if name not in shown]
    return f"Run by few entries, and no columns here: {', '.join(few)}." if few else ""


def _entries(board: dict[str, Any]) -> dict[str, set[str]]:
    """By variant, the entries that were run on it."""
    found: dict[str, set[str]] = {}
    for cell in board["cells"]:
        found.setdefault(cell["variant"], set()).add(cell["selector"])
    return found


def ranking(cells: Cells, variants: list[str]) -> list[tuple[float, str]]:
    """(mean rank, selector) of those that have every variant, best first; ties share their ranks' mean."""
    names = [name for name in cells if all(variant in cells[name] for variant in variants)]
    ranks = np.zeros(len(names))
    for variant in variants:
        means = [scores(cells[name][variant]).mean() for name in names]
        ranks += stats.rankdata([-mean for mean in means])
    return sorted(
        (float(rank) / len(variants), name) for rank, name in zip(ranks, names, strict=True)
    )


def differences(cells: Cells, name: str, variant: str) -> np.ndarray | None:
    """Paired differences of the score to full distillation, over the seeds of both; None without one."""
    full, own = cells.get(FULL, {}).get(variant), cells[name][variant]
    if full is None or name == FULL:
        return None
    mine, theirs = (dict(zip(cell["seeds"], scores(cell), strict=True)) for cell in (own, full))
    found = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return np.array(found) if found else None


def marks(cells: Cells, names: list[str], variant: str) -> dict[str, str]:
    """Arrow of every selector that is told apart from full distillation."""
    estimates = []
    for name in names:
        gap = differences(cells, name, variant)
        estimates.append(None if gap is None else t_estimate(gap.tolist()))
    adjusted = holm([None if e is None else e.p for e in estimates])
    return {
        name: "" if e is None or p is None or p >= 0.05 else ("▲" if e.mean > 0 else "▼")
        for name, e, p in zip(names, estimates, adjusted, strict=True)
    }


def worst_gap(cells: Cells, name: str, variants: list[str]) -> tuple[float, str]:
    """Smallest mean difference to full distillation over the variants, and where."""
    gaps = [(differences(cells, name, variant), variant) for variant in variants]
    return min(
        ((float(gap.mean()), v) for gap, v in gaps if gap is not None), default=(math.nan, "")
    )


def table(board: dict[str, Any], loss: str, budget: float) -> str:
    """Markdown table of one loss and budget."""
    variants, cells = variants_of(board), select_cells(board, loss, budget)
    order = ranking(cells, variants)
    names = [name for _, name in order]
    arrows = {variant: marks(cells, names, variant) for variant in variants}
    rows = []
    # Without a variant an entry has no rank; what it has is shown below the others.
    unranked = [(None, name) for name in sorted(set(cells) - set(names))]
    for rank, name in [*order, *unranked]:
        row = []
        for variant in variants:
            if variant not in cells[name]:
                row.append("-")
                continue
            estimate = t_estimate(scores(cells[name][variant]).tolist())
            last = finals(cells[name][variant]).mean()
            half = "" if estimate.high is None else f" ±{estimate.high - estimate.mean:.0f}"
            row.append(f"{estimate.mean:.0f}{half} → {last:.0f}{arrows[variant].get(name, '')}")
        gap, where = worst_gap(cells, name, [v for v in variants if v in cells[name]])
        worst = "" if name == FULL else f"{gap:+.0f} ({where})"
        place = "-" if rank is None else f"{rank:.1f}"
        rows.append([place, name, *row, worst])
    heads = ["rank", "selector", *variants, "worst against full"]
    return "\n".join(markdown_table(heads, rows, texts=(1,)))


def verdict(board: dict[str, Any], budget: float) -> str:
    """Which entries are not worse than full distillation in any variant, or the closest."""
    lines = []
    variants = variants_of(board)
    for loss in sorted({cell["loss"] for cell in board["cells"]}):
        cells = select_cells(board, loss, budget)
        names = [
            name for _, name in ranking(cells, variants) if cells[name][variants[0]]["budget"] < 1.0
        ]
        gaps = {name: worst_gap(cells, name, variants) for name in names}
        fine = [name for name in names if gaps[name][0] >= -MARGIN]
        words = LOSS_NAMES.get(loss, loss)
        if fine:
            lines.append(
                f"- {words}, {budget:.0%}: not worse than full in any variant: {', '.join(fine)}."
            )
        elif names:
            best = max(names, key=lambda name: gaps[name][0])
            gap, where = gaps[best]
            lines.append(
                f"- {words}, {budget:.0%}: none is within {MARGIN:g} point of full in every variant; the "
                f"closest is {best} ({gap:+.1f} points in *{where}*)."
            )
    return "\n".join(lines)


def generated(board: dict[str, Any], picture: str) -> str:
    """Everything on the page that follows from the numbers."""
    budgets = sorted({cell["budget"] for cell in board["cells"]} - {1.0})
    hours = sum(cell["cpu_seconds"] for cell in board["cells"]) / 3600
    runs = sum(len(cell["seeds"]) for cell in board["cells"])
    settings = board["settings"]
    parts = [
        f"{runs:,} runs of {settings['steps']} steps, {settings['per_device_train_batch_size']} rollouts a "
        f"step, learning rate {settings['learning_rate']:g}, {settings['test_prompts']} test prompts; "
        f"{hours:.1f} core hours. {left_out(board)}".rstrip(),
        f"![Score by selector, variant and loss at 5 %]({picture})",
        "## Not worse than full distillation at 5 %",
        verdict(board, 0.05),
    ]
    for loss in sorted({cell["loss"] for cell in board["cells"]}):
        parts += [f"## {LOSS_NAMES.get(loss, loss).capitalize()}"]
        for budget in sorted(budgets, key=lambda share: (share != 0.05, share)):
            parts += [f"### Budget {budget:.0%}", table(board, loss, budget)]
    return "\n\n".join(parts)


def write_page(board: dict[str, Any], path: Path, picture: str) -> None:
    """Write the page; what stands outside of the two markers is kept as it was."""
    write_generated(path, generated(board, picture), title="Leaderboard of the tiny lab")


def draw(board: dict[str, Any], path: Path, budget: float = 0.05) -> None:
    """Heat map of the scores at one budget: selectors by variants, one panel a loss."""
    variants = variants_of(board)
    losses = sorted({cell["loss"] for cell in board["cells"]})
    everything = [select_cells(board, loss, budget) for loss in losses]
    ranks: dict[str, list[float]] = {}
    for cells in everything:
        for rank, name in ranking(cells, variants):
            ranks.setdefault(name, []).append(rank)
    every = {name for cells in everything for name in cells}
    # An entry may have been run with one loss alone.
    names = sorted(every, key=lambda name: (np.mean(ranks.get(name, [math.inf])), name))
    figure, panels = plt.subplots(
        1,
        len(losses),
        figsize=(3.6 + 2.6 * len(losses), 1.4 + 0.27 * len(names)),
        sharey=True,
        squeeze=False,
    )
    for axes, loss, cells in zip(panels[0], losses, everything, strict=True):
        values = np.array(
            [
                [
                    scores(cells[name][v]).mean() if v in cells.get(name, {}) else np.nan
                    for v in variants
                ]
                for name in names
            ]
        )
        axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                shade = "white" if value < 60 else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=shade, size=8
                )
        axes.set_xticks(range(len(variants)), variants, rotation=30, ha="right", size=8)
        axes.set_yticks(range(len(names)), names, size=8)
        axes.set_title(LOSS_NAMES.get(loss, loss), size=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle(f"Mean accuracy over a run (%), budget {budget:.0%}", size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
