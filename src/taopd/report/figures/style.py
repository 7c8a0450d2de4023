"""Shared style of the PNG figures: colors, markers, error bars, words, files.

Series differ in marker, line style or hatch as well as in color. SVG ids are salted with a constant,
so that the same table gives the same file.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

from taopd.errors import DataError

logger = logging.getLogger(__name__)

_FONT = "DejaVu Sans"
"""matplotlib's own."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe-Ito, told apart by color-blind readers."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
UNITS = {"nats": "nats/token", "share": "share of the initial KL"}
TERMS = {
    "learnable": r"$\beta_L$ (learnable)",
    "incompatible": r"$\beta_I$ (incompatible)",
    "learnable - incompatible": r"$\beta_L - \beta_I$",
}
INTERVAL = "bars: 95 % cluster bootstrap"


def points(axes: Any, places: Any, rows: pd.DataFrame, index: int, label: str, column: str) -> None:
    """Markers with error bars; hollow where the table has no interval."""
    decided = rows["low"].notna().to_numpy()
    style = {"color": COLORS[index], "marker": MARKERS[index], "markersize": 6}
    axes.errorbar(
        np.asarray(places)[decided],
        rows[column][decided],
        yerr=spans(rows[decided], column),
        linestyle="none",
        capsize=3,
        label=label,
        **style,
    )
    axes.plot(
        np.asarray(places)[~decided],
        rows[column][~decided],
        linestyle="none",
        fillstyle="none",
        **style,
    )


def spans(rows: pd.DataFrame, column: str) -> np.ndarray:
    """[2, rows] distances from the value to the ends; NaN, which draws nothing, without an interval."""
    value = rows[column].to_numpy(float)
    spans = np.stack([value - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - value])
    return np.maximum(spans, 0.0)


def same_scale(panels: Sequence[Any]) -> None:
    """One y range for panels of one unit."""
    if panels:
        ends = [axes.get_ylim() for axes in panels]
        for axes in panels:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def outline() -> list[Any]:
    """Path effects: a white rim that keeps a black line visible on dark cells."""
    return [patheffects.Stroke(linewidth=4.5, foreground="white"), patheffects.Normal()]


def nonempty(rows: pd.DataFrame, what: str) -> None:
    """Raise a DataError that says `what` is missing if there are no rows."""
    if len(rows) == 0:
        raise DataError(f"nothing to draw: {what} in the table")


def gain_words(rows: pd.DataFrame) -> str:
    """Which KL the gain of a table is in."""
    return _kl_of(str(rows["gain"].iloc[0]))


def _kl_of(gain: str) -> str:
    return f"gain in {'reverse' if gain.startswith('gain_reverse') else 'forward'} KL"


def gain_label(gain: str) -> str:
    """Axis label of a gain column."""
    return f"{_kl_of(gain)}, {UNITS['share' if gain.endswith('_share') else 'nats']}"


def size_words(rows: pd.DataFrame) -> str:
    """n, clusters and how many tokens were left out."""
    n, excluded = int(rows["n"].min()), int(rows["n_excluded"].max())
    words = f"n = {n:,} tokens, {int(rows['num_clusters'].min())} clusters"
    return f"{words}, {excluded} excluded" if excluded else words


def headed(figure: Any, words: str) -> None:
    """Put words above a figure, as they stand: dollar signs of a user's title are no formula."""
    figure.suptitle(words, fontsize=9, x=0.01, ha="left", parse_math=False)


def readable(figure: Any) -> None:
    """Show the texts of a figure in fonts that have their characters; of what is left it is warned once.

    matplotlib's own font has neither Chinese nor emoji, and draws a box for each of them.
    """
    words = figure.findobj(Text)
    lacking = set("".join(text.get_text() for text in words))
    # matplotlib's last resort has a box for every letter.
    found = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts, names = sorted({(font.name, font.fname) for font in found}), []
    for name, file in [(_FONT, findfont(_FONT)), *fonts]:
        lacking = {letter for letter in lacking if letter.isprintable() and letter != " "}
        if not lacking:
            break
        try:
            known = {chr(code) for code in get_font(file).get_charmap()}
        except (OSError, RuntimeError):  # Of emoji in colors; matplotlib draws none.
            continue
        if lacking & known:
            names.append(name)
        lacking -= known
    if lacking:
        _say_boxes(" ".join(sorted(lacking)[:10]))
    for text in words if len(names) > 1 else ():
        text.set_fontfamily(names)


@cache
def _say_boxes(letters: str) -> None:
    logger.warning(
        "no font of this machine has %s: pictures show boxes in their place. Install one (as Noto Sans "
        "CJK), or name arms and studies in other letters",
        letters,
    )


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg, close the figure, return both paths."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    readable(figure)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with plt.rc_context({"svg.hashsalt": "taopd"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `readable` has told.
        for path in paths:
            date = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=date)
    plt.close(figure)
    return paths
