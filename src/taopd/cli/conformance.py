"""`taopd conformance`: recompute reference vectors and count mismatches."""

from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser


def run(argv: Sequence[str]) -> int:
    """Compare every file; 0 without a mismatch, 1 with any."""
    parser = Parser(
        prog="taopd conformance",
        description="Recompute every token metric, score and selection of reference vectors, "
        "and count mismatches: masks exact, floats to 1e-9 relative. Exit code 1 if there is any.",
        epilog="example:\n  taopd conformance tests/golden/topk_lists.json",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON file of reference vectors"
    )
    options = parser.parse_args(argv)

    return show(options.files)


def show(paths: Sequence[str | Path]) -> int:
    """Check files and print a table: values compared and mismatches by kind; 0 if none differ, else
    1."""
    from rich.table import Table

    from taopd.diagnose.conformance.check import KINDS, check_file
    from taopd.report.console import plain_console

    console = plain_console(highlight=False)
    reports = [check_file(path) for path in paths]
    table = Table(title="Conformance with the released selector")
    table.add_column("file", overflow="fold")
    for name in ("batches", "tokens", "kind", "compared", "mismatches"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for report in reports:
        for row, kind in enumerate(KINDS):
            head = [report.path, str(report.num_batches), str(report.num_tokens)]
            table.add_row(
                *(head if row == 0 else ["", "", ""]),
                kind,
                str(report.compared[kind]),
                str(report.mismatches[kind]),
                end_section=row == len(KINDS) - 1,
            )
    console.print(table)
    for report in reports:
        for what, count in sorted(report.not_compared.items()):
            console.print(
                f"{report.path}: not compared: {count} {what}", markup=False, soft_wrap=True
            )
        for line in report.first_mismatches:
            console.print(f"{report.path}: {line}", markup=False, soft_wrap=True)
    return int(any(report.num_mismatches for report in reports))
