"""The verdict at the top of the page: one sentence that says what the runs show, and how sure that is."""

from collections.abc import Sequence
from typing import Any

from taopd.report.evaluations import Evaluation, differences
from taopd.report.folders import Run, Sources, Study
from taopd.report.sections.accuracy import at_shared_rate, estimates_of, judged_by
from taopd.report.sections.tables import points_span
from taopd.report.study_table import bounds
from taopd.report.text import escape
from taopd.runs.shares import per_cent

CONTROL = "random"


def headline(sources: Sources) -> str:
    """A paragraph, empty where nothing was measured that it could be about."""
    sentences = (_of_study(study) for study in sources.studies)
    found = next(filter(None, sentences), "")
    found = found or _of_evaluations(sources.evaluations) or _of_runs(sources.runs)
    return f'<p class="verdict">{escape(found)}</p>' if found else ""


def _of_study(study: Study) -> str:
    """Which arm ends highest, and what the best selective arm has over random tokens."""
    # Of several learning rates the shared one: the best of many would flatter whoever tried more.
    groups = at_shared_rate(study)
    known = {
        name: found for name, found in estimates_of(study).items() if name in groups or not groups
    }
    # Differences are of the metric by which the study is judged: the accuracies beside them too.
    metric = judged_by(study)
    ends = {name: found[metric] for name, found in known.items() if metric in found}
    if len(ends) < 2:
        return ""
    selectors = {name: str(rows[0].get("selector", "")) for name, rows in groups.items() if rows}
    best = max(ends, key=lambda name: ends[name][0])
    mean, low, high = ends[best]
    interval = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    level = [name for name in ends if ends[name][0] == mean]
    who = f"{best} ends" if len(level) == 1 else f"{' and '.join(level)} end"
    who = who if len(level) < 4 else f"{len(level)} of {len(ends)} arms end"
    how = "" if metric == "greedy" else ", sampled"
    so_far = "So far, " if study.results.get("unfinished") else ""
    words = f"{so_far}{who} highest, with {per_cent(mean)} %{interval} of the held-out problems right{how}"
    chosen = [n for n in ends if selectors.get(n) not in ("full", CONTROL, "")]
    controls = [name for name in ends if selectors.get(name) == CONTROL]
    if chosen and controls:
        own = max(chosen, key=lambda name: ends[name][0])
        same = [n for n in controls if groups[n][0].get("budget") == groups[own][0].get("budget")]
        who = "it is" if level == [own] else f"{own} is"
        words += f"; {who} " + _against(study, own, same or controls, ends)
    seeds = {row.get("seed") for row in study.outcomes}
    # One seed orders the arms by luck as well: a second one may order them otherwise.
    return f"{words}." + (
        " One training seed: the order is not settled." if len(seeds) == 1 else ""
    )


def _against(study: Study, arm: str, controls: Sequence[str], ends: dict[str, Any]) -> str:
    """The difference to random tokens in points, with the study's interval where it has one."""
    for row in study.results.get("comparisons", []):
        if row.get("arm") == arm and row.get("reference") in controls and "difference" in row:
            low, high = bounds(row)
            found, interval = row["difference"], ""
            if low is not None and high is not None:
                ends_at = 100 * max(low, -1.0), 100 * min(high, 1.0)
                interval = " ({:+.0f} to {:+.0f})".format(*ends_at).replace("-", "−")
                if low <= 0 <= high:
                    interval += ", which decides nothing"
            return f"{_points(found)} random tokens at the same budget{interval}"
    return f"{_points(ends[arm][0] - ends[controls[0]][0])} {controls[0]}"


def _points(difference: float) -> str:
    side = "above" if difference >= 0 else "below"
    return f"{abs(100 * difference):.1f} points {side}"


def _of_evaluations(evaluations: Sequence[Evaluation]) -> str:
    """The best of the evaluated models, and whether it is above the next one on the same problems."""
    rated = [each for each in evaluations if "1" in each.results["pass_at_k"]]
    if not rated:
        return ""
    best = max(rated, key=lambda each: each.results["pass_at_k"]["1"])
    rate, problems = best.results["pass_at_k"]["1"], best.results.get("num_problems", 0)
    words = f"{best.name} answers {per_cent(rate)} % of {problems:,} problems right"
    pairs = [pair for pair in differences(rated) if pair.one is best]
    if not pairs:
        return f"{words}."
    closest = min(pairs, key=lambda pair: pair.estimate.mean)
    mean, low, high = closest.estimate.mean, closest.estimate.low, closest.estimate.high
    apart = f"{words}, {_points(mean)} {closest.other.name} on the same problems"
    if low is None or high is None:
        return f"{apart}."
    doubt = "" if low > 0 else ", which does not decide between them"
    return f"{apart} (95 % interval {points_span(low, high)}{doubt})."


def _of_runs(runs: list[Run]) -> str:
    """How far a run without a measured accuracy came."""
    if len(runs) != 1:
        return ""
    (run,) = runs
    curve = run.curve("loss/selected_nats")
    if len(curve) < 2:
        return ""
    steps = int(curve[-1][0])
    return (
        f"After {steps:,} steps the distillation loss is {curve[-1][1]:.3g} nats, from "
        f"{curve[0][1]:.3g}. Whether the student answers better is not measured here; `taopd evaluate` "
        "measures it."
    )
