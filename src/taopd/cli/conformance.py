"""`taopd conformance`: recompute reference vectors and count mismatches."""

from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser


def run(argv: Sequence[str]) -> int:
    """Compare every file; 0 without a mismatch, 1 with any."""
    parser = Parser(
        prog="taopd conformance",
        description="Recompute every token metric, score and selection of reference vectors,\n"
        "and count mismatches: masks exact, floats to 1e-9 relative. Exit code 1 if there is any.",
        epilog="example:\n  taopd conformance topk_lists.json",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON file of reference vectors"
    )
    options = parser.parse_args(argv)

    from taopd import conformance

    return conformance.run(options.files)
