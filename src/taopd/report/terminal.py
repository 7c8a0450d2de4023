"""Rollouts in a terminal: the inspector's heat map with rich, and plain where there is no terminal.

Eight shades of one hue, dark text on light ground and light text on dark, so that neither the terminal's
own colors nor color vision decide what can be read; kept tokens are underlined, and in plain text they
stand in [brackets].
"""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from taopd.report.console import plain_console
from taopd.report.rollouts import Rollout, unit_of
from taopd.report.text import readable, visible
from taopd.runs.shares import per_cent
from taopd.runs.signal_names import SELECTED_BY, SHADES, SIGNALS

BLUES = ("", "#eef5fb", "#dcebf7", "#c3ddf1", "#a5cce9", "#82b7df", "#5d9fd2", "#4590c8")
ORANGES = ("", "#fef4e8", "#fde6cb", "#fad3a4", "#f5bc79", "#eda552", "#e08f33", "#d27f20")
MAX_ROLLOUTS = 1_000
MAX_TOKENS = 4_000
"""Tokens of one rollout that are printed."""
MAX_PROMPT = 2_000
"""Characters of a prompt that are printed."""
MAX_KEPT = 20
"""Kept tokens of one rollout in its table."""


def choose(
    rollouts: Sequence[Rollout],
    *,
    wanted: Sequence[int] | None = None,
    order: str = "logged",
    wrong: bool = False,
    truncated: bool = False,
    teacher: str | None = None,
) -> list[Rollout]:
    """The rollouts that are asked for, in the order that is asked for."""
    found = [rollouts[index] for index in wanted] if wanted else list(rollouts)
    found = [one for one in found if not wrong or one.correct is False]
    found = [one for one in found if not truncated or one.line.get("truncated")]
    found = [one for one in found if teacher is None or one.line.get("teacher") == teacher]
    if order == "logged":
        return found
    name = {"taught": "kept"}.get(order, order)
    return sorted(found, key=lambda one: -_mean(one, name))


def show(
    rollouts: Sequence[Rollout],
    scale_from: Sequence[Rollout],
    *,
    signal: str,
    tokens: bool = False,
    console: Console | None = None,
) -> None:
    """Print rollouts with a legend.

    Args:
        scale_from: whose tokens set the scale, so that two calls on one run shade alike.
        tokens: also a table of every rollout's kept tokens.
    """
    console = console or plain_console(highlight=False)
    top = _top(scale_from, signal)
    # NO_COLOR, and terminals that have none, leave no shades to tell apart.
    plain = console.color_system is None or console.no_color
    console.print(_legend(signal, unit_of(SHADES[signal], rollouts), top, plain=plain))
    for rollout in rollouts:
        console.print()
        console.print(_head(rollout))
        console.print(Text(_visible_prompt(rollout, "prompt"), style="dim"))
        if "teacher_prompt" in rollout.line:
            text = _visible_prompt(rollout, "teacher_prompt")
            console.print(Text(f"the teacher reads: {text}", style="dim"))
        console.print(_body(rollout, signal, top, plain=plain))
        if tokens:
            console.print(_kept_table(rollout))


def _visible_prompt(rollout: Rollout, name: str) -> str:
    text = str(rollout.line.get(name, ""))
    more = f" … {len(text) - MAX_PROMPT:,} more characters" if len(text) > MAX_PROMPT else ""
    return visible(text[:MAX_PROMPT]) + more


def _values(rollout: Rollout, name: str) -> list[float]:
    values = rollout.line.get(name) or [math.nan] * len(rollout)
    return [math.nan if value is None else float(value) for value in values]


def _mean(rollout: Rollout, name: str) -> float:
    known = [value for value in _values(rollout, name) if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


def _top(rollouts: Sequence[Rollout], signal: str) -> float:
    """Value of the darkest shade: of the table, else the 99th percentile of the signal."""
    if (top := SHADES[signal].top) is not None or signal == "kept":
        return top or 1.0
    known = sorted(
        value for one in rollouts for value in _values(one, signal) if not math.isnan(value)
    )
    return (known[int(0.99 * (len(known) - 1))] if known else 1.0) or 1.0


def _level(value: float, top: float, signal: str) -> int:
    if math.isnan(value) or value <= 0:
        return 0
    if signal == "kept":
        return 5
    power = 1.0 if SHADES[signal].top else 0.5
    return min(7, int(8 * min(1.0, value / top) ** power))


def _style(level: int, kept: bool, signal: str) -> str:
    ramp = ORANGES if SHADES[signal].ramp == "o" else BLUES
    ground = f"black on {ramp[level]}" if level else ""
    return f"{ground} {'bold underline' if kept else ''}".strip()


def _legend(signal: str, unit: str, top: float, *, plain: bool) -> Text:
    known = SHADES[signal]
    text = Text(f"{known.name}: " if signal == "kept" else f"{known.name} ({unit}): ")
    if plain:
        return text.append("kept tokens in [brackets]")
    power = 1.0 if known.top else 2.0
    levels = (0, 5) if signal == "kept" else range(8)
    for level in levels:
        words = (
            {0: "not", 5: "kept"}[level]
            if signal == "kept"
            else f"{top * (level / 8) ** power:.2g}"
        )
        text.append(f" {words} ", style=_style(level, False, signal))
    return text.append("  each from its number on; ").append("kept", style="bold underline")


def _head(rollout: Rollout) -> Text:
    kept = rollout.line.get("kept") or []
    facts = [f"{visible(rollout.run)}, step {rollout.step}", f"{len(rollout):,} tokens"]
    if kept:
        facts.append(f"{per_cent(sum(map(bool, kept)) / len(kept))} % kept")
    if teacher := rollout.line.get("teacher"):
        facts.append(f"teacher {visible(str(teacher))}")
    if rollout.correct is not None:
        facts.append("right" if rollout.correct else "wrong")
    if rollout.line.get("truncated"):
        facts.append("truncated")
    return Text(", ".join(facts), style="bold")


def _body(rollout: Rollout, signal: str, top: float, *, plain: bool) -> Text:
    kept = rollout.line.get("kept") or [False] * len(rollout)
    text = Text()
    rows = list(zip(rollout.pieces, _values(rollout, signal), kept, strict=True))
    told = dict[int, str]()
    for after, result in rollout.line.get("tool_results", []):
        told[after] = told.get(after, "") + f"{{{visible(result)}}}"
    for place, (piece, value, is_kept) in enumerate(rows[:MAX_TOKENS]):
        # Not the student's: never scored.
        text.append(told.pop(place, ""), style="dim italic")
        if plain and is_kept:
            bare = piece.strip(" ")
            before, after = (
                piece[: len(piece) - len(piece.lstrip(" "))],
                piece[len(piece.rstrip(" ")) :],
            )
            text.append(f"{before}[{bare}]{after}")
        else:
            text.append(piece, style=_style(_level(value, top, signal), bool(is_kept), signal))
    text.append(told.get(len(rows), ""), style="dim italic")
    if len(rows) > MAX_TOKENS:
        text.append(f" … {len(rows) - MAX_TOKENS:,} more tokens", style="dim")
    return text


def _kept_table(rollout: Rollout) -> Table:
    """The kept tokens by rank: signals, and what both models found likeliest."""
    line = rollout.line
    kept = [i for i, kept in enumerate(line.get("kept") or []) if kept]
    more = f"the first {MAX_KEPT} of {len(kept):,} kept tokens" if len(kept) > MAX_KEPT else None
    table = Table(box=None, padding=(0, 2, 0, 0), caption=more, caption_justify="left")
    symbols = (SIGNALS[key].symbol for key in SELECTED_BY)
    for name in ("token", "rank", *symbols, *_BESTS):
        table.add_column(name, justify="left" if name in ("token", *_BESTS) else "right")
    # -1: no candidate, kept all the same (min_keep); it has no place in the order.
    ranks = line.get("rank") or [-1] * len(rollout)
    order = sorted(kept, key=lambda i: (ranks[i] < 0, ranks[i]))
    total = f" of {line['num_valid']:,}" if line.get("num_valid") else ""
    for i in order[:MAX_KEPT]:
        rank = "-" if ranks[i] < 0 else f"{ranks[i] + 1:,}{total}"
        signals = (f"{_values(rollout, name)[i]:.3g}" for name in SELECTED_BY)
        best = (_best(rollout, model, i) for model in ("student", "teacher"))
        cells = (rollout.pieces[i].strip("\n "), rank, *signals, *best)
        table.add_row(*map(Text, cells))
    return table


_BESTS = ("student's best", "teacher's best")


def _likely(logprob: float) -> str:
    """A probability in per cent, of a log-prob that was rounded: near 0 and 1 it has no digits to show."""
    percent = f"{100 * math.exp(logprob):.0f}"
    return {"0": "<1", "100": ">99"}.get(percent, percent)


def _best(rollout: Rollout, model: str, index: int) -> str:
    top = rollout.line.get(f"{model}_top")
    if not top or not top["ids"][index]:
        return ""
    names = rollout.line.get("vocabulary", {})
    pairs = zip(top["ids"][index][:3], top["logprobs"][index][:3], strict=True)
    return ", ".join(
        f"{readable(names.get(str(token)), rollout.kind).strip()} {_likely(logprob)} %"
        for token, logprob in pairs
    )
