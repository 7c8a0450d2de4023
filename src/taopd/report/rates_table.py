"""The arms of a study at several learning rates, as a table: on the terminal, as Markdown, for the page.

From `results.json` alone, whose "rates" `taopd.experiments.study.own_best` wrote.
"""

from typing import Any

from rich.table import Table

from taopd.report.console import arms_table
from taopd.report.generated_part import markdown_table
from taopd.runs.shares import per_cent

METHOD = (
    "Own best: each arm at the rate at which it is best. The interval holds for any choice of rates: with "
    "R rates of the arm and Q of the control, low is the largest over the arm's rates of the smallest over "
    "the control's of the lower ends at level 1 - 0.05/R, high the other way round at 1 - 0.05/Q. Over "
    "seeds: other training runs; over problems: these trained models on other problems. Spread: best minus "
    "worst rate, in points; noise alone gives some, which its interval allows for."
)
HEADS = (
    "arm",
    "rate",
    "%",
    "spread",
    "to full",
    "problems",
    "seeds",
    "to random",
    "problems",
    "seeds",
)
BASES = {"own_best": "own best", "shared": "shared"}


def shared_words(results: dict[str, Any]) -> str:
    """Which rate is the shared one, and who named it."""
    found = results["rates"]
    reason = {
        "config": "named by the study's config",
        "best of full": "at which full is best, a choice that favors full",
    }.get(found["shared_by"], "with the best mean over arms")
    return f"Shared learning rate: {found['shared_rate']:g}, {reason}."


def rows(results: dict[str, Any], basis: str, *, digits: int = 1) -> list[list[str]]:
    """Cells of every arm, as `HEADS` names them, at its own best rate ("own_best") or the shared one."""
    found = results["rates"]
    compared = {(row["arm"], row["to"]): row for row in found["comparisons"]}
    out = []
    for arm in found["arms"]:
        rate = arm["best_rate"] if basis == "own_best" else found["shared_rate"]
        accuracy = dict(map(tuple, arm["curve"])).get(rate)
        if accuracy is None:  # An unfinished study: this arm has no result at the shared rate yet.
            continue
        cells = [arm["name"], f"{rate:g}", per_cent(accuracy), spread_cell(arm, digits)]
        for to in ("full", "random"):
            row = (compared.get((arm["name"], to)) or {}).get(basis)
            if row is None:
                cells += ["-"] * 3
                continue
            cells.append(f"{100 * row['difference']:+.1f}")
            cells += [bounds(row.get(unit), digits) for unit in ("over_problems", "over_seeds")]
        out.append(cells)
    return out


def spread_cell(arm: dict[str, Any], digits: int) -> str:
    """Points between the best and the worst rate, with the interval over problems, or else over seeds."""
    spread = arm["spread"]
    known = [spread.get(unit) for unit in ("over_problems", "over_seeds")]
    ends = next((e for e in known if e and e["low"] is not None and e["high"] is not None), None)
    words = f"{spread['points']:.1f}"
    return f"{words} [{ends['low']:.{digits}f},{ends['high']:.{digits}f}]" if ends else words


def bounds(found: dict[str, Any] | None, digits: int) -> str:
    """An interval of a difference in points, a dash where it is unknown."""
    if not found or found["low"] is None or found["high"] is None:
        return "-"
    low, high = max(-1.0, found["low"]), min(1.0, found["high"])
    return f"[{100 * low:+.{digits}f},{100 * high:+.{digits}f}]"


def table(results: dict[str, Any]) -> Table:
    """Every arm at its own best rate, then at the shared one."""
    shown = arms_table(
        HEADS[1:],
        title=f"{len(results['rates']['rates'])} learning rates: each arm at its own best, then at the "
        "shared one",
        caption="95 % intervals in points, corrected for the choice of a best rate; over problems: of these "
        "trained models; over seeds: of other training runs. spread: best minus worst rate.",
    )
    for basis in BASES:
        for cells in rows(results, basis, digits=0):
            shown.add_row(*cells)
        shown.add_section()
    return shown


def curve_rows(results: dict[str, Any], mark: str = "") -> list[list[str]]:
    """Cells of every arm: name, accuracy in % at each rate, the best one marked."""
    out = []
    for arm in results["rates"]["arms"]:
        curve = dict(map(tuple, arm["curve"]))
        cells = [arm["name"]]
        for rate in results["rates"]["rates"]:
            text = per_cent(curve[rate]) if rate in curve else "-"
            cells.append(f"{mark}{text}{mark}" if rate == arm["best_rate"] else text)
        out.append(cells)
    return out


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines of the section of a study's page."""
    heads = ["arm", *(f"{rate:g}" for rate in results["rates"]["rates"])]
    lines = ["## Learning rates", "", "Accuracy in % by learning rate, an arm's best in bold:", ""]
    lines += markdown_table(heads, curve_rows(results, "**"))
    for basis, words in BASES.items():
        rest = f" ({results['rates']['shared_rate']:g})" if basis == "shared" else ""
        lines += ["", f"At the {words} rate{rest}, differences in points with 95 % intervals:", ""]
        lines += markdown_table(HEADS, rows(results, basis))
    return [*lines, "", METHOD, "", shared_words(results), ""]
