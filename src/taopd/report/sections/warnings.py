"""The warnings at the top of the page: what in the files limits the conclusions."""

import sys
from collections.abc import Sequence
from typing import Any

from taopd.experiments.study.analysis import COLLAPSE_POINTS, collapsed
from taopd.report.folders import Run, Sources, Study
from taopd.report.rollouts import Rollout
from taopd.report.sections.accuracy import judged_by
from taopd.report.sections.tables import percent
from taopd.report.study_table import notes
from taopd.report.text import escape
from taopd.runs.limits import DRIFT_WARN, TRUNCATED

MAX_SHOWN = 6


def warnings(sources: Sources, rollouts: Sequence[Rollout]) -> str:
    """A list, the gravest first; empty if there is nothing to say."""
    found = [text for study in sources.studies for text in _of_study(study)]
    found += [f"{run.name}: {text}" for run in sources.runs for text in _of_run(run)]
    if sources.runs and not rollouts:
        found.append("No rollouts were logged (log_rollouts: 0), so the token inspector is empty")
    found = list(dict.fromkeys(found))
    if not found:
        return ""
    items = [f"<li>{escape(text)}</li>" for text in found]
    shown, rest = "".join(items[:MAX_SHOWN]), "".join(items[MAX_SHOWN:])
    more = f"<details><summary>{len(items) - MAX_SHOWN} more</summary><ul>{rest}</ul></details>"
    return (
        '<div class="warnings" role="note" aria-label="warnings"><strong>Warnings</strong>'
        f"<ul>{shown}</ul>{more if rest else ''}</div>"
    )


def _of_study(study: Study) -> list[str]:
    found = []
    found += [f"{study.name}: {note}" for note in notes(study.results)]
    points = study.results.get("question", {}).get("collapse_points", COLLAPSE_POINTS)
    fallen = [row for row in study.outcomes if collapsed(row, points, judged_by(study))]
    if fallen:
        words = ", ".join(f"{row.get('name')} (seed {row.get('seed')})" for row in fallen[:6])
        more = f" and {len(fallen) - 6} more" if len(fallen) > 6 else ""
        found.append(
            f"{study.name}: collapsed (final accuracy more than {points:g} points below their own best): "
            f"{words}{more}"
        )
    if len({row.get("seed") for row in study.outcomes}) == 1:
        found.append(f"{study.name}: one training seed; its intervals are over prompts only")
    return found


def _of_run(run: Run) -> list[str]:
    found = []
    for source in dict.fromkeys(_source(line) for line in run.warned):
        first, *rest = [line for line in run.warned if _source(line) == source]
        steps = ", ".join(f"{line.get('step')}" for line in rest[:6])
        more = f" (other signs at step {steps})" if rest else ""
        found.append(f"{source}, step {first.get('step')}: {first.get('reason')}{more}")
    missing = [line for line in run.metrics if "loss" in line and not _finite(line["loss"])]
    if missing:
        found.append(f"the loss was not finite at step {missing[0].get('step')}")
    found += _skipped(run)
    found += _sampling(run)
    found += [
        f"check before training, {item.get('item')}: {item.get('measured')}. {item.get('advice')}"
        for item in run.check
        if item.get("level") != "pass"
    ]
    if run.teacher.get("compatibility") == "lower bound":
        found.append(
            "the teacher returned only its own top K: C is a lower bound, D is of two lists"
        )
    found += _unfinished(run)
    if run.env.get("git_dirty"):
        found.append("the work tree had uncommitted changes")
    return found


def _source(line: dict[str, Any]) -> str:
    # Runs of earlier versions name none: the guard was the only one.
    return str(line.get("source") or "collapse guard")


def _skipped(run: Run) -> list[str]:
    """Steps without an update, of which curves have nothing; a log has their share since the one before."""
    curve = run.curve("numerics/skipped")
    pairs = zip([(0, 0.0), *curve], curve, strict=False)
    count = round(sum(share * (step - before) for (before, _), (step, share) in pairs))
    if not count:
        return []
    first = next(step for step, share in curve if share > 0)
    steps = "1 step" if count == 1 else f"{count:,} steps"
    return [
        f"{steps} made no update (bad numbers, or no token to train on), the first by step {first:,}"
    ]


def _sampling(run: Run) -> list[str]:
    """Warnings about sampled tokens: log-probs, truncation, vocabulary."""
    found = []
    apart = [(step, v) for step, v in run.curve("rollout/drift_nats/mean") if v > DRIFT_WARN]
    if apart:
        step, drift = apart[0]
        found.append(
            f"the sampler's log-probs and the scoring pass differ by {drift:.2g} nats a token from step "
            f"{step:,} on (limit {DRIFT_WARN})"
        )
    clipped = [value for _, value in run.curve("completions/clipped_ratio")]
    if clipped and clipped[-1] > TRUNCATED:
        found.append(
            f"{percent(clipped[-1], 0)} % of the last completions were truncated at "
            "max_completion_length"
        )
    outside = [value for _, value in run.curve("rollout/outside_vocabulary")]
    if outside and max(outside) > 0.01:
        found.append(
            f"up to {percent(max(outside))} % of the tokens are outside the shared vocabulary and never train"
        )
    return found


def _unfinished(run: Run) -> list[str]:
    found = [
        f"the last line of {name} is cut: the run was killed or is still running"
        for name in run.torn
    ]
    if not run.metrics:
        return [*found, "no step was logged yet"]
    wanted = run.config.get("max_steps")
    done = max((step for step, _ in run.curve("step")), default=0)
    if isinstance(wanted, int) and 0 < done < wanted and not run.results:
        found.append(f"{done:,} of {wanted:,} steps are done; there are no results yet")
    elif wanted == -1 and done and not run.results:  # as many as the epochs have
        found.append(f"{done:,} steps are done; there are no results yet")
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
