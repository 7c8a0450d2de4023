"""`taopd inspect`: a run's rollouts in the terminal, shaded by a signal."""

import sys
from collections.abc import Sequence
from pathlib import Path

from taopd.cli import GRADING, Parser
from taopd.errors import ConfigError, DataError, suggest
from taopd.runs.signal_names import ORDERS, SHADES_OF_RUNS


def run(argv: Sequence[str]) -> int:
    """Read, filter, order, print."""
    parser = Parser(
        prog="taopd inspect",
        description="Rollouts of a run as running text. Tokens are shaded by a signal and kept tokens are "
        "underlined. Where the output is no terminal or has no colors: plain text, kept tokens in "
        "[brackets].",
        epilog="example:\n  taopd inspect runs/tiny --signal disagreement --order taught",
    )
    add = parser.flag
    add("RUN", "run folder", type=Path)
    add("--signal NAME", ", ".join(SHADES_OF_RUNS), default="learnable")
    add("--rollout N", "only this one, from 0; repeatable", type=int, action="append")
    add("--order NAME", choices=list(ORDERS), default="logged")
    add("--wrong", "only rollouts with a wrong answer")
    add("--truncated", "only truncated rollouts")
    add("--teacher NAME", "only rollouts of this one of several teachers")
    add("--limit N", "rollouts shown", default=4)
    add("--match HOW", f"{GRADING} (default: that of the run)")
    add("--tokens", "also a table of the kept tokens: rank, signals, both models' best")
    options = parser.parse_args(argv)

    from taopd.report import terminal
    from taopd.report.folders import read_folders
    from taopd.report.rollouts import logged, shown

    if options.signal not in SHADES_OF_RUNS:
        raise ConfigError(
            f"--signal {options.signal} is unknown.{suggest(options.signal, SHADES_OF_RUNS)}"
        )
    found = logged(read_folders([options.run]).runs)
    rollouts = shown(
        found, limit=terminal.MAX_ROLLOUTS, match=options.match, max_tokens=sys.maxsize
    )
    if not rollouts:
        raise DataError(
            f"{options.run} logged no rollouts: it is no folder of `taopd train`, log_rollouts was 0, or "
            "it has not begun"
        )
    total = sum(len(lines) for _, lines in found)
    if total > terminal.MAX_ROLLOUTS:
        print(
            f"{len(rollouts):,} of the {total:,} logged rollouts are looked at, evenly over the run; "
            "--rollout counts these",
            file=sys.stderr,
        )
    for index in options.rollout or []:
        if not 0 <= index < len(rollouts):
            raise ConfigError(f"--rollout {index}: there are {len(rollouts)}, counted from 0")
    known = sorted({str(name) for one in rollouts if (name := one.line.get("teacher"))})
    if options.teacher is not None and options.teacher not in known:
        hint = suggest(options.teacher, known) if known else " The run has one, without a name."
        raise ConfigError(f"--teacher {options.teacher}: no rollout has this teacher.{hint}")
    chosen = terminal.choose(
        rollouts,
        wanted=options.rollout,
        order=options.order,
        wrong=options.wrong,
        truncated=options.truncated,
        teacher=options.teacher,
    )
    terminal.show(
        chosen[: options.limit],
        rollouts,
        signal=options.signal,
        tokens=options.tokens,
    )
    if not chosen:
        print("no rollout matches these filters")
    return 0
