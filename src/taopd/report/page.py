"""The report: one HTML file that needs no network, no server and, for all but the inspector, no script.

Style sheet and script are the files of `assets/`, put into the page as they are; a content security
policy names their hashes, so that nothing else can run or load, whatever a model wrote. Rollouts are
data: a JSON description and a compressed stream, in script elements that are never executed.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from taopd import __version__
from taopd.errors import DataError
from taopd.report.arms import is_arm, named
from taopd.report.bank_rollouts import bank_rollouts
from taopd.report.folders import Sources, read_folders
from taopd.report.pack import pack
from taopd.report.rollouts import Rollout, read_rollouts
from taopd.report.sections import Section, all_sections
from taopd.report.sections.headline import headline
from taopd.report.sections.warnings import warnings
from taopd.report.text import embed, escape
from taopd.runs.jsonl import write_text
from taopd.runs.paths import expanded
from taopd.runs.signal_names import ORDERS

STYLES = ("page.css", "inspector.css")
SCRIPTS = ("data.js", "shade.js", "running.js", "details.js", "scatter.js", "main.js")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was written."""

    path: Path
    num_bytes: int
    num_rollouts: int
    sections: list[str]


def write_report(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    max_rollouts: int = 200,
    match: str | None = None,
) -> Report:
    """Read folders and write the page, whole or not at all.

    Args:
        folders: of train, evaluate, compare, demo and diagnose (banks, gains, one-step tables, reports), in
            any order.
        max_rollouts: shared by the runs.
        match: how logged completions are graded; see `taopd.experiments.evaluation.grading`.

    Raises:
        DataError: a folder that is missing, damaged, or holds nothing to show; an output that cannot be
            written.
    """
    path = expanded(output)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise DataError(f"the page cannot be {output}: give a file that ends in .html")
    sources = named(read_folders([expanded(folder) for folder in folders]))
    # Runs leave a quarter of the room to banks, where there are any.
    for_runs = max_rollouts - (max_rollouts // 4 if sources.gains or sources.banks else 0)
    # A selector's rollouts first, those of the controls after them.
    runs = sorted(sources.runs, key=lambda run: run.config.get("selector") in ("full", "random"))
    rollouts = read_rollouts(runs, limit=for_runs, match=match)
    rollouts += bank_rollouts(sources, limit=max(0, max_rollouts - len(rollouts)))
    sections = all_sections(sources, rollouts, _inspector(rollouts))
    shown = [section for section in sections if section.body]
    if not shown:
        raise DataError(
            f"{', '.join(map(str, folders))}: nothing was logged yet that a report could show"
        )
    heads = headline(sources), warnings(sources, rollouts)
    text = _page(_title(sources), shown, *heads, rollouts)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half of a surrogate pair
    try:
        there = path.resolve()  # a link stays one, to the new page
        there.parent.mkdir(parents=True, exist_ok=True)
        write_text(there, text)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error
    return Report(
        path=path,
        num_bytes=len(text.encode("utf-8")),
        num_rollouts=len(rollouts),
        sections=[section.title for section in shown],
    )


def _title(sources: Sources) -> str:
    names = [study.name for study in sources.studies]
    # A study that is not done yet has arms and no results.
    names += [run.path.parent.parent.name if is_arm(run) else run.name for run in sources.runs]
    diagnosed = (*sources.banks, *sources.gains, *sources.diagnostics, *sources.one_steps)
    names += [each.path.name for each in sources.evaluations]
    names += [path.name for path in diagnosed]
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _asset(name: str) -> str:
    return (files("taopd.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def policy(style: str, script: str) -> str:
    """The content security policy: this style sheet, this script, pictures in the page, no more."""
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _page(
    title: str,
    sections: Sequence[Section],
    headline: str,
    warning: str,
    rollouts: Sequence[Rollout],
) -> str:
    style = "\n" + "\n".join(_asset(name) for name in STYLES)
    modules = "\n".join(_asset(name) for name in SCRIPTS)
    script = f'\n"use strict";\n{{\nconst T = {{}};\n{modules}\n}}\n'
    toc = " ".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in sections)
    body = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2><p>{part.lead}</p>'
        f"{part.body}</section>"
        for part in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="taopd {escape(__version__)}">
<title>{escape(title)} · taopd report</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header class="top">
<p class="lead">taopd report</p>
<h1>{escape(title)}</h1>
{headline}
<nav class="toc" aria-label="sections">{toc}</nav>
{warning}
</header>
<main id="main">
{body}
</main>
<footer>Made by taopd {escape(__version__)} from run folders alone.
This file holds everything it shows.</footer>
{_data(rollouts)}
<script>{script}</script>
</body>
</html>
"""


def _data(rollouts: Sequence[Rollout]) -> str:
    if not rollouts:
        return ""
    described, stream = pack(rollouts)
    return (
        f'<script type="application/json" id="rollouts">{embed(described)}</script>\n'
        f'<script type="application/octet-stream" id="columns">{stream}</script>'
    )


def _control(name: str, text: str, inner: str) -> str:
    return f'<label for="{name}">{text}{inner}</label>'


def _inspector(rollouts: Sequence[Rollout]) -> str:
    if not rollouts:
        return ""
    order = "".join(f'<option value="{name}">{text}</option>' for name, text in ORDERS.items())
    controls = [
        _control("signal", "shade by", '<select id="signal"></select>'),
        _control("run", "run", '<select id="run"></select>'),
        _control("teacher", "teacher", '<select id="teacher"></select>'),
        _control("order", "order", f'<select id="order">{order}</select>'),
        _control("search", "prompt holds", '<input type="search" id="search">'),
        '<label class="check"><input type="checkbox" id="wrong">wrong answer</label>',
        '<label class="check"><input type="checkbox" id="truncated">truncated</label>',
        _control("beside", "beside it", '<select id="beside"></select>'),
    ]
    ranges = "".join(
        f'<label for="range-{name}">{text}<input type="number" step="any" id="range-{name}"></label>'
        for name, text in (("d0", "D from"), ("d1", "D to"), ("c0", "C from"), ("c1", "C to"))
    )
    return f"""<div class="nojs">{_static(rollouts)}</div>
<div class="inspector">
<p id="inspector-state" role="status">reading …</p>
<div class="controls">{"".join(controls)}</div>
<div class="legend" id="legend"></div>
<div class="panes">
<div><p class="count" id="count" role="status"></p>
<div class="list" id="list" role="group" aria-label="rollouts"></div></div>
<div><div class="sides" id="sides"></div>
<div class="scatter"><canvas id="scatter" width="420" height="260" role="img"
 aria-label="D against C of the tokens of this rollout; the fields beside it select ranges"></canvas>
<div class="ranges">{ranges}<p class="note" id="brushed" role="status"></p>
<button class="more" id="clear" type="button">clear</button></div></div>
</div>
<aside class="details" id="details" aria-live="polite" aria-label="the token pointed at"></aside>
</div>
</div>"""


def _static(rollouts: Sequence[Rollout]) -> str:
    """For readers without script: the first rollouts with the kept tokens marked."""
    parts = [
        "<p>The inspector needs JavaScript. Without it, a few rollouts, kept tokens marked:</p>"
    ]
    for rollout in rollouts[:3]:
        kept: list[Any] = rollout.line.get("kept") or [False] * len(rollout)
        pairs = list(zip(rollout.pieces, kept, strict=True))[:400]
        text = "".join(f"<mark>{escape(w)}</mark>" if k else escape(w) for w, k in pairs)
        parts.append(
            f"<h3>{escape(rollout.run)}, step {rollout.step}</h3>"
            f'<div class="prompt">{escape(rollout.prompt[:400])}</div>'
            f'<div class="text">{text}</div>'
        )
    return "".join(parts)
