"""Pictures of the fixed-context diagnostic, from its tables alone.

Each function takes a table as the analyses return it and writes a PNG and an SVG; nothing here
computes an interval. Legible in black and white: series differ in marker, line style or hatch, and
the one color scale is monotone in lightness. Every picture says its unit, n and what the bars are.

Values that an analysis could not decide have no interval in the table; they are drawn hollow,
without a bar.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from taopd.errors import DataError
from taopd.report.figures.style import (
    COLORS,
    INTERVAL,
    MARKERS,
    STYLES,
    TERMS,
    UNITS,
    gain_label,
    gain_words,
    nonempty,
    outline,
    points,
    same_scale,
    save,
    size_words,
    spans,
)

NUM_BINS = 10
"""Bins of equal count along D for the mean lines."""
MIN_PER_CELL = 3
"""Tokens below which a hexagon is left out: the color of one token says nothing about a mean."""
MIN_PER_BIN = 5


def draw_gain_against_disagreement(
    tokens: pd.DataFrame, folder: Path, *, k: int = 16, gain: str = "gain_forward"
) -> list[Path]:
    """`gain_vs_disagreement`: gain against D, hexagons colored by mean C, and mean gain in bins of D
    for the top and the bottom third of C.

    Args:
        tokens: a token table; rows with a non-finite gain are left out and counted in the title.

    Raises:
        DataError: a missing column, or no row to draw.
    """
    names = [f"disagreement_k{k}", f"compatibility_k{k}", gain]
    x, c, y = _finite(tokens, names).T
    floor = max(float(np.quantile(x, 0.01)), 1e-6)
    log_x = np.log10(np.maximum(x, floor))
    low, high = np.quantile(y, [0.005, 0.995])
    shown = np.clip(y, low, high)
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    cells = axes.hexbin(
        log_x, shown, C=c, gridsize=42, mincnt=MIN_PER_CELL, cmap="cividis", linewidths=0.1
    )
    # Means of cells vary less than C itself; the scale is theirs, cut at 2 % on either side.
    shades = np.asarray(cells.get_array())
    if shades.size:
        cells.set_clim(*np.quantile(shades, [0.02, 0.98]))
    figure.colorbar(cells, ax=axes, extend="both", label=f"C, mean in the cell (K = {k})")
    cuts = np.quantile(c, [1 / 3, 2 / 3])
    thirds = (("high C (top third)", c >= cuts[1]), ("low C (bottom third)", c <= cuts[0]))
    for index, (label, mine) in enumerate(thirds):
        places, means = _binned(log_x[mine], y[mine])
        axes.plot(
            places,
            means,
            ("-", "--")[index],
            color="black",
            linewidth=2,
            marker=("o", "s")[index],
            markersize=6,
            markerfacecolor=("white", "black")[index],
            markeredgecolor="white" if index else "black",
            label=f"mean gain, {label}",
            path_effects=outline(),
        )
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set(xlabel=f"D (nats, K = {k}, log scale)", ylabel=gain_label(gain))
    decades = np.arange(np.floor(log_x.min()), np.ceil(log_x.max()) + 1)
    axes.set_xticks(decades, [f"{10.0**place:g}" for place in decades])
    axes.set_xticks(np.log10(np.outer(10**decades, np.arange(2, 10))).ravel(), minor=True)
    axes.set_xlim(log_x.min() - 0.1, log_x.max() + 0.1)
    left_out = len(tokens) - len(y)
    title = (
        f"n = {len(y):,} tokens; gains outside the 0.5 and 99.5 % quantiles, and D below {floor:.2g}, drawn "
        f"at the edge;\nhexagons of fewer than {MIN_PER_CELL} tokens left out"
    )
    title += f"; {left_out} non-finite left out" if left_out else ""
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper left", framealpha=0.9)
    return save(figure, folder, "gain_vs_disagreement")


def draw_coefficients(table: pd.DataFrame, folder: Path) -> list[Path]:
    """`coefficients`: beta_L, beta_I and their difference with intervals over K, a panel per form of
    the gain; `table` from `decomposition`.

    Raises:
        DataError: if the table has no row of model B.
    """
    rows = table[(table["model"] == "B") & table["term"].isin(TERMS)]
    nonempty(rows, "no coefficients of model B")
    targets = list(dict.fromkeys(rows["target"]))
    ks = sorted(set(rows["k"]))
    figure, panels = plt.subplots(
        1,
        len(targets),
        figsize=(2.4 + 2.5 * len(targets), 3.9),
        layout="constrained",
        squeeze=False,
    )
    for axes, target in zip(panels[0], targets, strict=True):
        for index, (term, label) in enumerate(TERMS.items()):
            mine = rows[(rows["target"] == target) & (rows["term"] == term)].set_index("k").loc[ks]
            offset = np.arange(len(ks)) + 0.22 * (index - 1)
            points(axes, offset, mine, index, label, column="beta")
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_xticks(range(len(ks)), [str(k) for k in ks])
        axes.set(xlabel="K", xlim=(-0.5, len(ks) - 0.5))
        unit = rows.loc[rows["target"] == target, "unit"].iloc[0]
        axes.set_title(f"{target.replace('_', ' ')}{' %' if '_' in target else ''}", fontsize=9)
        axes.set_ylabel(f"{UNITS.get(unit, unit)} per s.d.", fontsize=8)
    same_scale([axes for axes, target in zip(panels[0], targets, strict=True) if target != "rank"])
    figure.suptitle(
        f"Decomposition regression, {gain_words(rows)}; {size_words(rows)}; {INTERVAL}", fontsize=9
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, folder, "coefficients")


def draw_matched(table: pd.DataFrame, folder: Path) -> list[Path]:
    """`matched_top_n`: mean gain of what each selector keeps, a panel per budget, random hatched and
    drawn as a line through the others; `table` from `matched_top_n`.

    Raises:
        DataError: if the table is empty.
    """
    nonempty(table, "no rows")
    budgets = sorted(set(table["budget"]))
    order = list(table.loc[table["budget"] == budgets[-1], "selector"])
    figure, panels = plt.subplots(
        1,
        len(budgets),
        figsize=(2.6 + 2.4 * len(budgets), 1.4 + 0.27 * len(order)),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes, budget in zip(panels[0], budgets, strict=True):
        rows = table[table["budget"] == budget].set_index("selector").loc[order]
        places = np.arange(len(order))
        bars = axes.barh(places, rows["value"], color="#9CC7E3", edgecolor="black", linewidth=0.6)
        for name, bar in zip(order, bars, strict=True):
            if name == "random":
                bar.set(hatch="xx", facecolor="#DDDDDD")
            elif rows.loc[name, "num_tied"]:
                bar.set(hatch="//", facecolor="white", edgecolor="#888888")
        axes.errorbar(
            rows["value"], places, xerr=spans(rows, "value"), fmt="none", ecolor="black", capsize=2
        )
        axes.axvline(rows.loc["random", "value"], color="black", linestyle=":", linewidth=1.2)
        axes.axvline(0, color="#444444", linewidth=0.8)
        requested = int(rows["num_requested"].iloc[0])
        # A selector with too few candidates keeps fewer: its mean is over other numbers of tokens.
        for place, (kept, value) in enumerate(zip(rows["num_kept"], rows["value"], strict=True)):
            if kept < requested and np.isfinite(value):
                axes.annotate(f" {int(kept):,}", (value, place), fontsize=7, va="bottom")
        axes.set_title(f"{100 * budget:g} %, N = {requested:,}", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
    panels[0][0].set_yticks(range(len(order)), order, fontsize=8)
    panels[0][0].invert_yaxis()
    figure.supxlabel(f"mean {gain_words(table)}, {UNITS[table['unit'].iloc[0]]}", fontsize=9)
    figure.suptitle(
        f"Matched top-N; {size_words(table)}; {INTERVAL}; dotted line: random\n"
        "hatched bars: some places went by position among equal scores; a number: tokens, where fewer than N",
        fontsize=9,
    )
    return save(figure, folder, "matched_top_n")


def draw_q3_gap(table: pd.DataFrame, folder: Path) -> list[Path]:
    """`q3_gap`: high-C minus low-C gain inside Q3 by proxy and K, plain and matched; `table` from
    `q3_gap` or `robustness`. Thirds where the table has several group numbers.

    Raises:
        DataError: if the table is empty.
    """
    nonempty(table, "no rows")
    groups = 3 if (table["groups"] == 3).any() else table["groups"].iloc[0]
    rows = table[table["groups"] == groups]
    proxies, ks = list(dict.fromkeys(rows["proxy"])), sorted(set(rows["k"]))
    pairs = [(proxy, k) for proxy in proxies for k in ks]
    figure, axes = plt.subplots(
        figsize=(max(4.6, 1.6 + 0.5 * len(pairs)), 4.0), layout="constrained"
    )
    for index, version in enumerate(("plain", "matched")):
        mine = rows[rows["version"] == version].set_index(["proxy", "k"])
        mine = mine.loc[[pair for pair in pairs if pair in mine.index]]
        offset = np.array([pairs.index(pair) for pair in mine.index]) + 0.2 * (2 * index - 1)
        words = ("plain", "matched on H, D, position in the completion")[index]
        points(axes, offset, mine, index, words, column="value")
    for edge in range(len(ks), len(pairs), len(ks)):
        axes.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.8)
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(pairs)), [f"K={k}" for _, k in pairs], fontsize=8)
    for place, proxy in enumerate(proxies):
        axes.annotate(
            proxy,
            ((place + 0.5) * len(ks) - 0.5, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -26),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xlim(-0.6, len(pairs) - 0.4)
    axes.set_ylabel(
        f"top minus bottom {'third' if groups == 3 else f'1/{groups}'} of C\n"
        f"{gain_words(rows)}, {UNITS[rows['unit'].iloc[0]]}",
        fontsize=9,
    )
    axes.set_title(
        f"Q3 gap; {size_words(rows)}\n{INTERVAL}; hollow: undecided", fontsize=9, loc="left"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, folder, "q3_gap")


def draw_gain_curve(table: pd.DataFrame, folder: Path, *, by_step: bool = True) -> list[Path]:
    """`gain_curve`: mean gain over checkpoints by group of tokens, bands are intervals; `table` from
    `gain_curve`.

    Args:
        by_step: its `step` is the optimizer's; else the place of the checkpoint in the order given.

    Raises:
        DataError: if the table is empty.
    """
    nonempty(table, "no rows")
    figure, axes = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(table["group"])):
        mine = table[table["group"] == name].sort_values("step")
        axes.plot(
            mine["step"],
            mine["value"],
            linestyle=STYLES[index % len(STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            markersize=5,
            label=f"{name} (n = {int(mine['num'].iloc[0]):,})",
        )
        axes.fill_between(
            mine["step"],
            mine["low"].astype(float),
            mine["high"].astype(float),
            color=COLORS[index % len(COLORS)],
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set(
        xlabel="optimizer step" if by_step else "checkpoint, in the order given",
        ylabel=f"mean {gain_words(table)}\n{UNITS[table['unit'].iloc[0]]}",
    )
    axes.set_title(
        f"Gain on the bank; {size_words(table)}\nband: 95 % cluster bootstrap",
        fontsize=9,
        loc="left",
    )
    axes.legend(frameon=False, fontsize=8)
    return save(figure, folder, "gain_curve")


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean x and mean y in bins of equal count."""
    order = np.argsort(x, kind="stable")
    bins = [part for part in np.array_split(order, NUM_BINS) if len(part) >= MIN_PER_BIN]
    return np.array([x[part].mean() for part in bins]), np.array([y[part].mean() for part in bins])


def _finite(tokens: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    missing = [name for name in names if name not in tokens.columns]
    if missing:
        raise DataError(f"the token table has no column {missing[0]!r}")
    values = tokens[list(names)].to_numpy(np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) == 0:
        raise DataError("no token to draw: the table is empty or no value is finite")
    return values
