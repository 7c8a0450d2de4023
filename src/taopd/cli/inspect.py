"""`taopd inspect`: a run's rollouts in the terminal, shaded by a signal."""

from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser
from taopd.errors import ConfigError, DataError, suggest

_HELP = """usage: taopd inspect RUN [options]

Rollouts of a run as running text, tokens shaded by a signal, kept tokens underlined. Plain text,
kept tokens in [brackets], where the output is no terminal.

  --signal NAME   disagreement, compatibility, entropy, score, learnable, incompatible or kept
  --rollout N     only this one, counted from 0 (may be repeated)
  --order NAME    logged, taught, disagreement, incompatible (logged)
  --wrong         only rollouts with a wrong answer
  --truncated     only truncated rollouts
  --limit N       rollouts shown (4)
  --match HOW     how completions are graded: auto, exact, math or regex:PATTERN (auto)
  --tokens        below each rollout, its kept tokens with rank, signals and both models' best

example:
  taopd inspect runs/tiny --signal disagreement --order taught
"""
ORDERS = ("logged", "taught", "disagreement", "incompatible")


def run(argv: Sequence[str]) -> int:
    """Read, filter, order, print."""
    parser = Parser(prog="taopd inspect", page=_HELP)
    parser.add_argument("run", type=Path)
    parser.add_argument("--signal", default="learnable")
    parser.add_argument("--rollout", type=int, action="append")
    parser.add_argument("--order", choices=ORDERS, default="logged")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--truncated", action="store_true")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--match")
    parser.add_argument("--tokens", action="store_true")
    options = parser.parse_args(argv)

    from taopd.report import terminal
    from taopd.report.folders import read_folders
    from taopd.report.rollouts import read_rollouts

    if options.signal not in terminal.SIGNALS:
        raise ConfigError(
            f"--signal {options.signal} is unknown.{suggest(options.signal, terminal.SIGNALS)}"
        )
    if options.limit < 1:
        raise ConfigError(f"--limit {options.limit}: must be at least 1")
    rollouts = read_rollouts(
        read_folders([options.run]).runs, limit=terminal.MAX_ROLLOUTS, match=options.match
    )
    if not rollouts:
        raise DataError(
            f"{options.run} logged no rollouts (log_rollouts was 0, or it has not begun)"
        )
    for index in options.rollout or []:
        if not 0 <= index < len(rollouts):
            raise ConfigError(f"--rollout {index}: there are {len(rollouts)}, counted from 0")
    chosen = terminal.choose(
        rollouts,
        wanted=options.rollout,
        order=options.order,
        wrong=options.wrong,
        truncated=options.truncated,
    )
    terminal.show(
        [rollout for rollout, _ in zip(chosen, range(options.limit), strict=False)],
        rollouts,
        signal=options.signal,
        tokens=options.tokens,
    )
    if not chosen:
        print("no rollout is like that")
    return 0
