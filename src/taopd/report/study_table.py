"""A study as a table: on the terminal and as Markdown, from its `results.json` and `timings.json` alone."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from taopd.report import rates_table
from taopd.report.console import arms_table
from taopd.report.generated_part import markdown_table
from taopd.runs.shares import per_cent

Bracket = Callable[[float | None, float, float | None], str]
_EQUAL_WORDS = {
    "steps": "equal optimizer steps ({:g})",
    "update_norm": "equal steps, every update of L2 norm {:g}",
    "selected_tokens": "equal selected tokens ({:g})",
    "seconds": "equal seconds of training ({:g})",
}


def equal_words(results: dict[str, Any]) -> str:
    """What all arms had in common."""
    question = results["question"]
    words = _EQUAL_WORDS.get(question["equal"], str(question["equal"]))
    return words.format(question["amount"]) if question["amount"] else words.split(" (")[0]


def seeds_words(results: dict[str, Any]) -> str:
    """How many seeds an arm has: "3 seeds", "1 seed"; "1 to 3 seeds" where arms have not finished."""
    counts = sorted({arm.get("num_seeds", len(results["seeds"])) for arm in results["arms"]})
    words = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return f"{words} seed{'' if counts[-1] == 1 else 's'}"


def units_words(results: dict[str, Any]) -> str:
    """What the intervals are over: seeds, or held-out problems where two arms have one seed in common."""
    common = [len(row["seeds"]) for row in results["comparisons"]] or [len(results["seeds"])]
    seeds = "over seeds, of differences paired within seeds"
    problems = "over held-out problems, of differences paired by problem"
    if min(common) > 1:
        return seeds
    return problems if max(common) == 1 else f"{seeds}; of one common seed {problems}"


def bounds(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Interval of a comparison over seeds; of one seed over problems, where these are known."""
    found = row if row.get("low") is not None else row.get("over_problems") or {}
    return found.get("low"), found.get("high")


def notes(results: dict[str, Any]) -> list[str]:
    """What limits a study's table, in words: arms that are not there yet or differ in what was equal."""
    found = []
    if waiting := results.get("unfinished"):
        done = len(results.get("outcomes") or ())
        found.append(f"not finished: {done} of {done + waiting} arms and seeds are here")
    arms = [arm for arm in results.get("arms", ()) if "note" in arm]
    return found + [f"{arm['name']}: {arm['note']}" for arm in arms]


def table(results: dict[str, Any]) -> Table:
    """One row per arm, accuracies and differences in points."""
    question = results["question"]
    shown = arms_table(
        ("mean", "med.", "coll.", "to full", "p", "to random", "p"),
        title=f"{results['title']}: held-out {question['metric']} accuracy in %, "
        f"{seeds_words(results)}, {equal_words(results)}",
        caption=f"+-: 95 % t intervals {units_words(results)}; med.: median; coll.: collapsed seeds; "
        + ". ".join(["p: Holm-corrected over all tests", *notes(results), ""]).rstrip(),
    )
    for name, mean, middle, fallen, _, *differences, _ in rows(results, bracket=_plus_minus):
        shown.add_row(name, mean, middle, fallen, *differences)
    return shown


def rows(results: dict[str, Any], *, bracket: Bracket | None = None) -> list[list[str]]:
    """Cells of every arm: name, mean, median, collapsed, sampled, to full, p, to random, p, kept.

    bracket: writes low, mean and high of an interval in %; default [low,high].
    """
    bracket = bracket or _brackets
    metric = results["question"]["metric"]
    other = "sampled" if metric == "greedy" else "greedy"
    compared = {(row["arm"], row["to"]): row for row in results["comparisons"]}
    out = []
    for arm in results["arms"]:
        main = arm[metric]
        cells = [
            arm["name"],
            per_cent(main["mean"]) + bracket(main["low"], main["mean"], main["high"]),
        ]
        cells.append(per_cent(main["median"]))
        cells.append(f"{len(arm['collapsed_seeds'])}/{arm['num_seeds']}")
        cells.append(per_cent(arm[other]["mean"]) if other in arm else "-")
        for to in ("full", "random"):
            row = compared.get((arm["name"], to))
            cells.append("-" if row is None else _signed(row, bracket))
            cells.append("-" if row is None or row["p_holm"] is None else p_words(row["p_holm"]))
        kept = arm.get("kept_fraction")
        cells.append("-" if kept is None else per_cent(kept))
        out.append(cells)
    return out


def markdown(results: dict[str, Any], timings: Sequence[dict[str, Any]]) -> str:
    """The page of a study: the table, the noise floor, what was equal, seconds."""
    metric = results["question"]["metric"]
    other = "sampled" if metric == "greedy" else "greedy"
    seconds: dict[str, list[float]] = {}
    for entry in timings:
        if "train_seconds" in entry:
            seconds.setdefault(entry["name"], []).append(entry["train_seconds"])
    means = {name: f"{sum(spent) / len(spent):.0f}" for name, spent in seconds.items()}
    against = ("to full", "p", "to random", "p")
    heads = ("arm", metric, "median", "collapsed", other, *against, "kept %", "s")
    cells = [[*row, means.get(row[0], "-")] for row in rows(results)]
    lines = [f"# {results['title']}", "", *markdown_table(heads, cells)]
    base = results["arms"][0]["base_accuracy"]
    lines += [
        "",
        f"{seeds_words(results)}, {equal_words(results)}; accuracy in %, student before "
        f"{per_cent(base)}. In brackets: 95 % t intervals {units_words(results)}, in points, cut at what is "
        "possible; p is two-sided, over seeds, Holm-corrected over all tests of this table. Collapsed: the "
        "final accuracy lies more than "
        f"{results['question']['collapse_points']:g} points below the arm's own best. "
        "s: mean seconds of training.",
        "",
        results["noise_floor"]["words"],
        "",
        f"Pairing: {results['pairing']['words']}.",
        "",
    ]
    lines += [f"{note}.\n" for note in notes(results)]
    lines += rates_table.markdown(results) if "rates" in results else []
    return "\n".join(lines)


def _brackets(low: float | None, mean: float, high: float | None) -> str:
    if low is None or high is None:
        return ""
    ends = f"{100 * low:.0f}", f"{100 * high:.0f}"
    # Whole points, unless an end would read 0 and is not, or the interval would have no width.
    close = any(float(text) == 0.0 != end for text, end in zip(ends, (low, high), strict=True))
    if low < high and (close or ends[0] == ends[1]):
        ends = f"{100 * low:.1f}", f"{100 * high:.1f}"
    return f" [{','.join(ends)}]"


def _plus_minus(low: float | None, mean: float, high: float | None) -> str:
    # One end may be cut at what is possible: the other has the whole width.
    if low is None or high is None:
        return ""
    half = 100 * max(high - mean, mean - low)
    return f"+-{half:.0f}" if half >= 0.5 or half == 0 else f"+-{half:.1g}"


def _signed(row: dict[str, Any], bracket: Bracket) -> str:
    low, high = bounds(row)
    return f"{100 * row['difference']:+.1f}" + bracket(low, row["difference"], high)


def p_words(p: float) -> str:
    """A p value, never as 0: "<0.001"."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
