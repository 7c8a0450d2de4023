"""Settings, versions, machine and command of every run."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from taopd.report.folders import Run, Sources, Study
from taopd.report.sections.tables import table
from taopd.report.text import escape, shared

LEAD = "Settings that differ from the defaults, and the version, commit and machine of each run."
_MAIN = ("selector", "budget", "loss", "score_top_k", "anchor_coef", "gradient_window", "max_steps")
_GOES_ON = ("--resume", "--resume-with-changes")
"""Flags of a command that went on with a run: it has finished, or is begun anew."""
_OF_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py", "__main__.py")
_HIDDEN = {"output_dir", "run_name", "logging_dir"}


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
    for text, owners in origins.items():
        parts.append(f'<p class="note">{escape(", ".join(owners))}: {text}</p>')
    for run in sources.runs:
        if run.teacher:
            parts.append(f'<p class="note">{escape(run.name)}: {escape(_teacher(run.teacher))}</p>')
    looks = [(run, text) for run in sources.runs if (text := _check(run))]
    for text in dict.fromkeys(text for _, text in looks):
        names = ", ".join(run.name for run, other in looks if other == text)
        parts.append(f'<p class="note">{escape(names)}: {escape(text)}</p>')
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
    same = [n for n in names if len({_value(run.config.get(n)) for run in runs}) == 1]
    differing = [name for name in names if name not in same]
    shown = list(runs[:12])
    rows = [[n, *_show_apart([run.config.get(n) for run in shown])] for n in differing]
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


def _value(value: Any) -> str:
    """The same text for the same value: `_show` cuts and rounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) <= sys.float_info.max:  # JSON has integers that no float holds
        return repr(float(value))
    return json.dumps(value, sort_keys=True, default=str)


def _show_apart(values: Sequence[Any]) -> list[str]:
    """Each value as it is shown, from where they differ if what is shown would not tell."""
    alike: dict[str, set[str]] = {}
    for value in values:
        alike.setdefault(_show(value), set()).add(str(value))
    return [
        _show(value) if len(alike[_show(value)]) < 2 else _rest(str(value), alike[_show(value)])
        for value in values
    ]


def _rest(text: str, others: set[str]) -> str:
    """A text from a little before the place where it and the others differ."""
    start = len(shared(others))
    return text if len(text) <= 80 else f"…{_show(text[max(0, start - 20) :])}"


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


def _teacher(about: dict[str, Any]) -> str:
    """The remote teacher, or several, and whether C is exact."""
    if isinstance(several := about.get("teachers"), dict):
        kind = {"compatibility": about.get("compatibility")}
        return " ".join(
            f"{name}: {_teacher(one | kind)}"
            for name, one in several.items()
            if isinstance(one, dict)
        )
    version = f" {about['version']}" if about.get("version") else ""
    where = f" at {about['url']}" if about.get("url") else ""
    why = f" ({about['why']})" if about.get("why") else ""
    kind_of_c = {"exact": "exact", "lower bound": "a lower bound"}.get(
        str(about.get("compatibility")), "not known"
    )
    kind, model = about.get("kind", "asked"), about.get("model") or "not named"
    return f"teacher {model}, {kind}{version}{where}; C is {kind_of_c}{why}."


def _check(run: Run) -> str:
    """The result of the check before training, in one line; warnings are listed at the top."""
    counts = Counter(str(item.get("level")) for item in run.check)
    if not counts:
        return ""
    words = (f"{counts[level]} {level}" for level in ("pass", "warn", "fail") if counts[level])
    return f"checked before training: {', '.join(words)}."


def _command(env: dict[str, Any]) -> str:
    """What began the run, from its first step on; empty for a notebook and for what is not known."""
    argv = env.get("argv")
    if not isinstance(argv, list) or not argv:
        return ""
    program, *words = map(str, argv)
    path = PurePath(program)
    if path.name in ("taopd", "taopd.exe") or path.parts[-2:] == ("taopd", "__main__.py"):
        return shlex.join(["taopd", *(word for word in words if word not in _GOES_ON)])
    is_script = path.suffix == ".py" and path.name not in _OF_NOTEBOOKS
    return shlex.join(["python", program, *words]) if is_script else ""
