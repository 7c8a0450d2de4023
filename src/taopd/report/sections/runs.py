"""What was run, how to run it again, and what to be wary of."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from taopd.report.folders import Run, Sources, Study
from taopd.report.sections.tables import table
from taopd.report.text import escape

LEAD = "Settings that differ from the defaults; everything else is as the version below has it."
_MAIN = ("selector", "budget", "loss", "score_top_k", "anchor_coef", "gradient_window", "max_steps")
_HIDDEN = {"output_dir", "run_name", "logging_dir"}
COLLAPSE = 0.2
"""Share of accuracy below its own best at which an arm is named in the warnings."""


def body(sources: Sources) -> str:
    """One table of settings, one column per run, and where the runs come from."""
    parts = []
    if sources.runs:
        parts.append(_settings(sources.runs))
    named: list[Study | Run] = [*sources.studies, *sources.runs]
    named = [one for one in named if one.env]
    origins: dict[str, list[str]] = {}
    for one in named:
        origins.setdefault(_origin(one.env), []).append(one.name)
    for text, names in origins.items():
        parts.append(f'<p class="note">{escape(", ".join(names))}: {text}</p>')
    rows = [[one.name, command] for one in named if (command := _command(one.env))]
    if rows:
        commands = table(["run", "command"], rows)
        parts.append(f"<details><summary>How to run it again</summary>{commands}</details>")
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    """Rows: settings that any run changed. Columns: runs; many runs that agree are one column."""
    changed = {run.name: _changed(run) for run in runs}
    names = list(dict.fromkeys(name for settings in changed.values() for name in settings))
    first = [name for name in _MAIN if name in names]
    names = first + [name for name in names if name not in first]
    same = [n for n in names if len({_show(run.config.get(n)) for run in runs}) == 1]
    differing = [name for name in names if name not in same]
    shown = list(runs[:12])
    rows = [[n, *(_show(run.config.get(n)) for run in shown)] for n in differing]
    parts = []
    if rows:
        parts.append(table(["setting", *(run.name for run in shown)], rows))
        if len(runs) > len(shown):
            parts.append(f'<p class="note">and {len(runs) - len(shown)} more runs</p>')
    if same:
        both = "Same in all" if len(runs) > 1 else "Settings"
        short = [[name, _show(runs[0].config.get(name))] for name in same]
        parts.append(
            f"<details{' open' if len(short) <= 8 and not rows else ''}><summary>{both} "
            f"({len(short)})</summary>{table(['setting', 'value'], short)}</details>"
        )
    return "".join(parts)


def _changed(run: Run) -> dict[str, Any]:
    if run.changed is not None:
        return {name: value for name, value in run.changed.items() if name not in _HIDDEN}
    return {name: run.config[name] for name in _MAIN if name in run.config}


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _origin(env: dict[str, Any]) -> str:
    """Versions, machine and commit, as HTML."""
    versions = env.get("versions", {})
    known = ", ".join(
        f"{name} {versions[name]}"
        for name in ("taopd", "torch", "transformers", "trl", "python")
        if versions.get(name)
    )
    commit = env.get("git_commit")
    state = " with uncommitted changes" if env.get("git_dirty") else ""
    where = f"commit <code>{escape(commit[:12])}</code>{state}" if commit else "no commit recorded"
    devices = ", ".join(map(str, env.get("devices", [])[:4]))
    return f"{escape(known)}; {where}; {escape(devices)}; {escape(str(env.get('utc', ''))[:10])}."


def _command(env: dict[str, Any]) -> str:
    argv = env.get("argv")
    if not isinstance(argv, list) or len(argv) < 2:
        return ""
    return shlex.join(["taopd", *map(str, argv[1:])])


def warnings(sources: Sources) -> str:
    """What a reader should know before the first number, as a list; empty if there is nothing."""
    found = [text for run in sources.runs for text in _run_warnings(run)]
    for study in sources.studies:
        seeds = {row.get("seed") for row in study.outcomes}
        if len(seeds) == 1:
            found.append(f"{study.name}: one training seed; its intervals are over prompts only")
        fallen = [row for row in study.outcomes if _fell(row["accuracy_curve"])]
        if fallen:
            words = ", ".join(f"{row['name']} (seed {row.get('seed')})" for row in fallen[:6])
            found.append(f"{study.name}: collapsed, far below its own best at the end: {words}")
    found = list(dict.fromkeys(found))
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found[:12])
    more = f"<li>and {len(found) - 12} more</li>" if len(found) > 12 else ""
    return f'<div class="warnings" role="note"><ul>{items}{more}</ul></div>'


def _fell(curve: Sequence[Sequence[float]]) -> bool:
    return bool(curve) and max(y for _, y in curve) - curve[-1][1] > COLLAPSE


def _run_warnings(run: Run) -> list[str]:
    found = []
    if run.env.get("git_dirty"):
        found.append(f"{run.name}: the work tree had uncommitted changes")
    clipped = [value for _, value in run.curve("completions/clipped_ratio")]
    if clipped and clipped[-1] > 0.2:
        found.append(
            f"{run.name}: {100 * clipped[-1]:.0f} % of the last completions were truncated at "
            "max_completion_length"
        )
    outside = [value for _, value in run.curve("rollout/outside_vocabulary")]
    if outside and max(outside) > 0.01:
        found.append(f"{run.name}: up to {100 * max(outside):.1f} % of the tokens never train")
    missing = [line["step"] for line in run.metrics if "loss" in line and not _finite(line["loss"])]
    if missing:
        found.append(f"{run.name}: the loss was not a number at step {missing[0]}")
    wanted = run.config.get("max_steps")
    done = max((line.get("step", 0) for line in run.metrics), default=0)
    if isinstance(wanted, int) and 0 < done < wanted and not run.results:
        found.append(f"{run.name}: has done {done:,} of its {wanted:,} steps, and no results yet")
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
