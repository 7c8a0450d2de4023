"""Evaluations of single models, and what one is above another on the same problems."""

from collections.abc import Sequence

from taopd.report.charts import figure
from taopd.report.evaluations import Difference, Evaluation, differences
from taopd.report.row_charts import intervals
from taopd.report.sections.tables import first_of, percent, points, points_span, span, table

MOST_PAIRS = 12


def body(evaluations: Sequence[Evaluation]) -> str:
    """A chart and a table of accuracies with intervals, and a table of paired differences."""
    rated = [each for each in evaluations if "1" in each.results["pass_at_k"]]
    if not rated:
        return ""
    rows, dots = [], []
    for each in rated:
        rate = each.results["pass_at_k"]["1"]
        low, high = each.results.get("intervals", {}).get("1", (None, None))
        data = str(each.results.get("dataset", "–"))
        cells = [each.name, each.model, data, each.decoding, percent(rate), span(low, high)]
        rows.append([*cells, str(each.results.get("num_problems", "–"))])
        ends = [None if end is None else 100 * end for end in (low, high)]
        dots.append((each.name, 100 * rate, *ends))
    chart = intervals(
        "accuracy by evaluation",
        dots,
        x_label="accuracy, %",
        colors=[each.color for each in rated],
    )
    heads = ["evaluation", "model", "problems of", "decoding", "accuracy, %", "95 %", "problems"]
    note = "95 % interval over the problems (Wilson)"
    drawn = f'<div class="figures grid">{figure("Accuracy of single models, %", chart, note)}</div>'
    return drawn + table(heads, rows, numeric=(4, 5, 6)) + _differences(differences(rated))


def _differences(pairs: Sequence[Difference]) -> str:
    if not pairs:
        return ""
    rows = []
    for pair in pairs[:MOST_PAIRS]:
        found = pair.estimate
        verdict = "higher" if found.low is not None and found.low > 0 else "not decided"
        cells = [points(found.mean), points_span(found.low, found.high), f"{found.n:,}", verdict]
        rows.append([pair.one.name, pair.other.name, *cells])
    heads = ["evaluation", "less", "difference, points", "95 %", "same problems", "verdict"]
    note = (
        '<p class="note">Differences problem by problem (paired t interval over the problems). They say '
        "which of these two models is better, not which way of training: that takes several seeds "
        "(`taopd compare`).</p>"
    )
    note += first_of(len(rows), len(pairs), "pairs; taopd compare shows all")
    return f"<h3>On the same problems</h3>{note}{table(heads, rows, numeric=(2, 3, 4))}"
