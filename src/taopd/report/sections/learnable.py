"""Verdicts and pictures of the fixed-context diagnostic, from its report folder."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taopd.report.bank_rollouts import MOST_CHECKPOINTS
from taopd.report.charts import figure
from taopd.report.folders import Sources, read_json
from taopd.report.row_charts import bars
from taopd.report.sections.tables import first_of, table
from taopd.report.text import escape
from taopd.runs.parquet import read_table
from taopd.runs.schemas import MANIFEST, VERDICTS
from taopd.runs.shares import signed
from taopd.runs.validation import read_document

LEAD = "Gain at fixed contexts: how far the KL to the teacher fell from before to after training."
PICTURES = {
    "gain_vs_disagreement": "Gain against disagreement, colored by compatibility",
    "coefficients": "Gain per standard deviation of learnable and of incompatible disagreement",
    "matched_top_n": "Mean gain of each selector's tokens at equal budgets",
    "q3_gap": "Compatible minus incompatible tokens at low entropy and high disagreement (Q3)",
    "gain_curve": "Gain over the checkpoints",
}
MAX_PICTURE = 400_000
"""Bytes; a larger file is named and not shown."""
CLAIM_HEADS = ("claim", "holds", "undecided here", "does not hold", "cannot be told")
CLASSES = {"holds": "holds", "does not hold": "fails"}


def body(sources: Sources) -> str:
    """Verdicts and pictures of report folders, mean gains of folders of gains, sizes of banks."""
    parts = [_report(path) for path in sources.diagnostics]
    parts += [_gains(path) for path in sources.gains]
    parts += [_one_step(path) for path in sources.one_steps]
    parts += [_bank(path) for path in sources.banks]
    return "".join(parts)


def claim_rows(verdicts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of every claim, as `CLAIM_HEADS` names them: how often it was judged so."""
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        counts.setdefault(str(verdict.get("claim")), Counter())[str(verdict.get("verdict"))] += 1
    return [[claim, *(str(own[name]) for name in CLAIM_HEADS[1:])] for claim, own in counts.items()]


def _report(path: Path) -> str:
    verdicts = read_document(path / "verdicts.json", VERDICTS)
    sentences = "".join(
        f'<li><strong class="{CLASSES.get(str(v.get("verdict")), "")}">'
        f"{escape(v.get('verdict', ''))}</strong> ({escape(v.get('direction', ''))} KL, "
        f"{escape(v.get('unit', ''))}): {escape(v.get('sentence', ''))}</li>"
        for v in verdicts
    )
    return (
        f"<h3>{escape(path.name)}</h3>"
        + table(CLAIM_HEADS, claim_rows(verdicts), numeric=(1, 2, 3, 4))
        + f"<details><summary>All {len(verdicts)} verdicts in words</summary><ul>{sentences}</ul></details>"
        + _pictures(path)
    )


def _pictures(path: Path) -> str:
    found = []
    for name, words in PICTURES.items():
        file = path / f"{name}.png"
        if not file.is_file():
            continue
        if file.stat().st_size > MAX_PICTURE:
            found.append(f'<p class="note">{escape(file.name)} is too large for this page</p>')
            continue
        raw = file.read_bytes()
        # Width and height, from the PNG's header, so that nothing moves when the picture appears.
        size = [int.from_bytes(raw[place : place + 4], "big") for place in (16, 20)]
        image = (
            f'<img src="data:image/png;base64,{base64.b64encode(raw).decode("ascii")}" '
            f'width="{size[0]}" height="{size[1]}" alt="{escape(words)}">'
        )
        found.append(figure(words, image, whole_row=size[0] > 1.7 * size[1]))
    return f'<div class="figures grid">{"".join(found)}</div>' if found else ""


def _gains(path: Path) -> str:
    checkpoints: list[dict[str, Any]] = read_json(path / "manifest.json", MANIFEST).get(
        "checkpoints", []
    )
    groups = (("mean", "all tokens"), ("learnable", "learnable"), ("incompatible", "incompatible"))
    charts = []
    for checkpoint in checkpoints[:MOST_CHECKPOINTS]:
        rows = [
            (words, float(value), f"{signed(value, 3)} nats")
            for short, words in groups
            if isinstance(value := checkpoint.get(f"gain_forward_nats/{short}"), int | float)
        ]
        if rows:
            title = str(checkpoint.get("label", "checkpoint"))
            charts.append(figure(title, bars(title, rows), "mean gain in forward KL"))
    if not charts:
        return ""
    note = first_of(MOST_CHECKPOINTS, len(checkpoints), "checkpoints")
    return f'<h3>{escape(path.name)}</h3>{note}<div class="grid">{"".join(charts)}</div>'


def _one_step(path: Path) -> str:
    """What one step on each selector's tokens did to them, to the others, and in fresh contexts."""
    names = ("selector", "optimizer", "variant", "measure")
    found = read_table(path / "summary.parquet", (*names, "mean", "low", "high"), words=names)
    optimizer, variant = found["optimizer"].iloc[0], found["variant"].iloc[-1]
    found = found[(found["optimizer"] == optimizer) & (found["variant"] == variant)]
    rows = []
    for selector, own in found.groupby("selector", sort=False):
        values = own.set_index("measure")["mean"]
        cells = [values.get(f"gain_forward_{group}") for group in ("selected", "others", "fresh")]
        cells.append(values.get("gain_forward_fresh_over_random"))
        shown = ("–" if c is None else signed(c, 4).replace("-", "−") for c in cells)
        rows.append([str(selector), *shown])
    heads = ["one step on the tokens of", "those, nats", "others, nats", "fresh contexts, nats"]
    note = (
        f"Fall of the forward KL in nats per token after one step ({optimizer}, "
        f"{str(variant).replace('_', ' ')}), mean over batches; last column: less random tokens."
    )
    return f'<h3>{escape(path.name)}</h3><p class="note">{escape(note)}</p>' + table(
        [*heads, "fresh, over random"], rows, numeric=range(1, 5)
    )


def _bank(path: Path) -> str:
    manifest = read_json(path / "manifest.json")
    names = ("num_prompts", "num_completions", "num_tokens", "vocab_size", "k", "temperature")
    rows = [[name.replace("_", " "), str(manifest[name])] for name in names if name in manifest]
    return f"<h3>{escape(path.name)}</h3>" + table(["bank", "value"], rows) if rows else ""
