"""A study at several learning rates: accuracy against the rate, own best and shared, spread."""

from collections.abc import Sequence

from taopd.report import rates_table
from taopd.report.arms import color_of
from taopd.report.charts import Series, figure, key, lines
from taopd.report.folders import Study
from taopd.report.sections.accuracy import ceiling
from taopd.report.sections.tables import table
from taopd.report.text import escape

LEAD = "The same arms at every learning rate, compared at a shared one and at each arm's own best."
_SIZE = (460, 240)


def body(studies: Sequence[Study]) -> str:
    """Per study with rates: the chart, accuracies by rate, and the comparisons at both kinds of rate."""
    return "".join(_study(study) for study in studies if "rates" in study.results)


def _study(study: Study) -> str:
    results = study.results
    arms = results["rates"]["arms"]
    series = [
        Series(
            label=arm["name"],
            points=[(rate, 100 * mean) for rate, mean in arm["curve"]],
            color=color_of(study, arm["name"]),
        )
        for arm in arms
    ]
    chart = lines(
        "accuracy against learning rate",
        series,
        to=ceiling(series),
        log_x=True,
        size=_SIZE,
        x_label="learning rate (logarithmic)",
    )
    several = len({rate for arm in arms for rate, _ in arm["curve"]}) > 1
    parts = [f"<h3>{escape(str(results.get('title') or study.name))}</h3>"]
    if several:
        parts.append(key([(one.label, one.color) for one in series]))
        parts.append(figure("Accuracy at the end against learning rate, %", chart))
    heads = ["arm", *(f"{rate:g}" for rate in results["rates"]["rates"])]
    parts.append(table(heads, rates_table.curve_rows(results), numeric=range(1, len(heads))))
    numeric = range(1, len(rates_table.HEADS))
    for basis, name in rates_table.BASES.items():
        parts.append(f"<h3>At the {name} rate, differences in points with 95 % intervals</h3>")
        parts.append(table(rates_table.HEADS, rates_table.rows(results, basis), numeric=numeric))
    parts.append(f"<p>{escape(rates_table.METHOD)} {escape(rates_table.shared_words(results))}</p>")
    return "".join(parts)
