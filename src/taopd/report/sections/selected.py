"""What was selected: by place in the completion, token class, quadrant and token text.

From `selection/*.parquet` where a run wrote it (every token), else from the logged rollouts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from taopd.report.charts import figure
from taopd.report.folders import Run
from taopd.report.rollouts import Rollout
from taopd.report.row_charts import bars
from taopd.report.sections.tables import first_of, percent, table
from taopd.report.text import escape, token_class
from taopd.runs.parquet import read_table
from taopd.runs.signal_names import QUADRANTS

LEAD = (
    "Per group of tokens: the share that trained, and its part of all kept tokens. The thin line is the "
    "share over all tokens."
)
MAX_RUNS, MAX_FILES, NUM_TOKENS, NUM_PLACES = 3, 60, 8, 8
NO_TEXT = "not known"
"""Class of a token whose text no rollout of the page shows: files of every token hold ids."""


def body(runs: Sequence[Run], rollouts: Sequence[Rollout]) -> str:
    """Per run: bar charts, and the tokens kept most and least often."""
    parts: list[str] = []
    # The random control last: its kept tokens say nothing about a selector.
    ordered = sorted(runs, key=lambda run: run.config.get("selector") == "random")
    ordered = [run for run in ordered if run.config.get("selector") != "full"]
    for run in ordered:
        if len(parts) == MAX_RUNS:
            return first_of(MAX_RUNS, len(ordered), "runs that select") + "".join(parts)
        words = _words(run, rollouts)
        tokens, source = _every_token(run)
        if tokens is None:
            tokens, source = _of_rollouts(run, rollouts), "the rollouts of this page"
        if tokens is None:
            continue
        # No quadrant: a token that may not train (stop_tokens: exclude). Rollouts may lack them all.
        if tokens["quadrant"].any():
            tokens = tokens[tokens["quadrant"] > 0]
        if len(tokens) and not tokens["kept"].all():
            parts.append(_run(run, tokens, words, source))
    return "".join(parts)


def _words(run: Run, rollouts: Sequence[Rollout]) -> dict[int, str]:
    """Readable text of the token ids that the logged rollouts show."""
    return {
        token: piece
        for rollout in rollouts
        if rollout.run == run.name
        for token, piece in zip(rollout.line.get("token_ids", []), rollout.pieces, strict=False)
    }


def _every_token(run: Run) -> tuple[pd.DataFrame | None, str]:
    """The selection files, at most `MAX_FILES` of them, evenly over the run; and what they are, in words."""
    paths = sorted((run.path / "selection").glob("step-*.parquet"))
    if not paths:
        return None, ""
    places = np.unique(
        np.linspace(0, len(paths) - 1, min(MAX_FILES, len(paths))).round().astype(int)
    )
    columns = ["position", "token_id", "kept", "quadrant"]
    words = "every logged token"
    if len(places) < len(paths):
        words += f" of {len(places)} of {len(paths):,} generation batches, evenly over the run"
    return pd.concat([read_table(paths[p], columns, only=True) for p in places]), words


def _of_rollouts(run: Run, rollouts: Sequence[Rollout]) -> pd.DataFrame | None:
    frames = []
    for rollout in rollouts:
        line = rollout.line
        if rollout.run != run.name or not line.get("kept") or not line.get("token_ids"):
            continue
        columns = {
            "position": range(len(rollout)),
            "token_id": line["token_ids"],
            "kept": [bool(kept) for kept in line["kept"]],
            "quadrant": line.get("quadrant") or [0] * len(rollout),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames) if frames else None


def _run(run: Run, tokens: pd.DataFrame, words: dict[int, str], source: str) -> str:
    overall = tokens["kept"].mean()
    known = tokens[tokens["token_id"].isin(words)]
    classes = tokens["token_id"].map({token: token_class(word) for token, word in words.items()})
    note = f"From {source}."
    if rest := len(tokens) - len(known):
        note += (
            f" The text of {rest:,} tokens is in no rollout of this page: their class is {NO_TEXT}, and they "
            "are in neither list of tokens."
        )
    charts = [
        figure(
            "By place in the completion",
            _bars(tokens, _places(tokens["position"]), run.color),
            "token number",
        ),
        figure(
            "By entropy H and disagreement D",
            _bars(tokens, tokens["quadrant"].map(QUADRANTS), run.color),
        ),
        figure("By token class", _bars(tokens, classes.fillna(NO_TEXT), run.color)),
    ]
    tables = _most_and_least(known, words)
    return (
        f"<h3>{escape(run.name)}: {escape(percent(overall))} % of {len(tokens):,} tokens kept</h3>"
        f'<p class="note">{note}</p>'
        f'<div class="grid">{"".join(charts)}{tables}</div>'
    )


def _places(position: pd.Series) -> pd.Series:
    """Bins of equal count along the completion, named by their first and last token."""
    last = int(position.max())
    if last < 2 * NUM_PLACES:
        return (position + 1).astype(str).str.rjust(len(str(last + 1)))
    edges = np.unique(np.quantile(position, np.linspace(0, 1, NUM_PLACES + 1)).astype(int))
    names = [
        f"{a + 1:,}–{b:,}" if b > a + 1 else f"{b:,}"
        for a, b in zip(edges[:-1], [*edges[1:-1], last + 1], strict=True)
    ]
    return pd.cut(position, [*edges[:-1], last + 1], right=False, labels=names)


def _bars(tokens: pd.DataFrame, by: pd.Series, color: int) -> str:
    """Kept share per group in the run's color, with the group's share of the kept tokens in words."""
    groups = tokens.groupby(
        by.to_numpy() if not isinstance(by.dtype, pd.CategoricalDtype) else by,
        sort=True,
        observed=True,
    )["kept"]
    total = max(1, int(tokens["kept"].sum()))
    rows = [
        (
            str(name),
            float(kept.mean()),
            f"{percent(kept.mean())} % · {percent(kept.sum() / total, 0)} % of kept",
        )
        for name, kept in groups
    ]
    overall = float(tokens["kept"].mean())
    return bars("kept share", rows, reference=overall, colors=[color] * len(rows))


def _most_and_least(tokens: pd.DataFrame, words: dict[int, str]) -> str:
    """Tokens kept most often, and frequent tokens kept least often."""
    found = tokens.groupby("token_id")["kept"].agg(["size", "sum", "mean"]).reset_index()
    often = found[found["size"] >= max(5, found["size"].quantile(0.25))]
    most = often[often["sum"] > 0].sort_values(["mean", "sum"], ascending=False).head(NUM_TOKENS)
    rest = often.drop(most.index)  # where there are few tokens, none stands in both
    least = rest.sort_values(["mean", "size"], ascending=[True, False]).head(NUM_TOKENS)
    parts = []
    for title, rows in (("Tokens kept most often", most), ("Tokens kept least often", least)):
        if rows.empty:
            continue
        columns = (rows[name].tolist() for name in ("token_id", "mean", "size"))
        cells = [
            [_quoted(words[token]), percent(share), f"{seen:,}"]
            for token, share, seen in zip(*columns, strict=True)
        ]
        inner = table(["token", "kept, %", "times seen"], cells, numeric=(1, 2))
        parts.append(f"<figure><figcaption>{title}</figcaption>{inner}</figure>")
    return "".join(parts)


def _quoted(word: str) -> str:
    bare = word.removesuffix(" ")
    return f"␣{bare[1:]}" if bare.startswith(" ") else bare or "␣"
