"""Accuracy over steps in small panels: the picture of the pages that compare many settings or labs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from taopd.report.figures.style import COLORS, plt

COLUMNS = 5
Line = tuple[str, Sequence[int], Sequence[float]]
"""Its name, steps and shares; lines of one name have one color and one entry in the legend."""


def draw_panels(panels: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Write the picture, a panel a title.

    Example:
        >>> draw_panels({"dialect": [("reach", [0, 20], [0.4, 1.0])]}, path)  # doctest: +SKIP
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name, *_ in lines))
    colors = dict(zip(names, COLORS, strict=False))
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    size = (2.3 * columns, 1.6 * height + 0.4)
    figure, grid = plt.subplots(height, columns, figsize=size, sharey=True, squeeze=False)
    shown = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, steps, shares in lines:
            values = [100 * share for share in shares]
            (shown[name],) = axes.plot(steps, values, color=colors[name], lw=1.2)
        axes.set_title(title, fontsize=8)
        axes.set_ylim(-4, 104)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    drawn = [shown[name] for name in names]
    figure.legend(drawn, names, frameon=False, fontsize=9, loc="upper right", ncols=len(names))
    figure.supylabel("greedy accuracy, %", fontsize=9)
    figure.supxlabel("step", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / size[1]))
    figure.savefig(path, dpi=110)
    plt.close(figure)
