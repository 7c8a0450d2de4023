"""`taopd report`: run folders as one HTML page."""

import time
from collections.abc import Sequence
from pathlib import Path

from taopd.cli import GRADING, Parser


def run(argv: Sequence[str]) -> int:
    """Read the folders, write the page, say how large it is."""
    parser = Parser(
        prog="taopd report",
        description="One self-contained HTML file from folders of train, evaluate, compare and diagnose: "
        "settings, accuracy with intervals, training curves, selected tokens, the token inspector.",
        epilog="example:\n  taopd report runs/tiny runs/tiny-random -o report.html",
    )
    add = parser.flag
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folders in any order"
    )
    add("-o, --output FILE", "the page", default=Path("report.html"))
    add("--max-rollouts N", "rollouts in the inspector, shared by the runs", default=200)
    add("--match HOW", f"{GRADING} (default: that of the run)")
    options = parser.parse_args(argv)

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
