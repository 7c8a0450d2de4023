"""`taopd report`: run folders as one HTML page."""

import time
from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser
from taopd.errors import ConfigError

_HELP = """usage: taopd report FOLDER [FOLDER ...] [options]

One self-contained HTML file from run, study, bank, gains and diagnostic folders: what was run, the
outcome with intervals, training curves, what was selected, and the token inspector.

  -o, --output FILE   the page (report.html)
  --max-rollouts N    rollouts in the inspector, shared by the runs (200)
  --match HOW         how logged completions are graded: auto, exact, math or regex:PATTERN (auto)

example:
  taopd report runs/tiny runs/tiny-random -o report.html
"""


def run(argv: Sequence[str]) -> int:
    """Read the folders, write the page, say how large it is."""
    parser = Parser(prog="taopd report", page=_HELP)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--max-rollouts", type=int, default=200)
    parser.add_argument("--match")
    options = parser.parse_args(argv)
    if options.max_rollouts < 0:
        raise ConfigError(f"--max-rollouts {options.max_rollouts}: must be 0 or more")

    from taopd.report.page import write_report

    started = time.perf_counter()
    report = write_report(
        options.folders, options.output, max_rollouts=options.max_rollouts, match=options.match
    )
    seconds = time.perf_counter() - started
    print(
        f"{report.path}: {report.num_bytes / 1e6:.2f} MB, {report.num_rollouts} rollouts, "
        f"{len(report.sections)} sections ({', '.join(report.sections)}), {seconds:.1f} s"
    )
    return 0
