"""`taopd diagnose report`: every analysis of a folder of gains, as tables, pictures and sentences."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from taopd.cli import Parser, positive
from taopd.cli.progress import CountedProgress
from taopd.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from taopd.diagnose.gain_analysis import Analysis


def run(argv: Sequence[str]) -> int:
    """Read, analyse, write, draw, print the verdicts."""
    parser = Parser(
        prog="taopd diagnose report",
        description="Does teachability predict what was learned? Analyze the gains of the last checkpoint. "
        "Each claim of the paper gets a verdict (holds, does not hold, undecided, cannot be told) with "
        "number, interval and n.",
        epilog="example:\n  taopd diagnose report runs/bank-gain",
    )
    add = parser.flag
    add("GAINS", "folder that `taopd diagnose gain` wrote", type=Path)
    add("--k K", "support size of the scores (default: 16 where the bank has it)", type=positive)
    add(
        "--cluster NAME",
        "unit of the intervals",
        choices=("prompt", "completion"),
        default="prompt",
    )
    add("--reference", "the released tools' choices, to compare with a published number")
    add("--num-resamples N", "of the bootstrap", default=1000)
    add("--seed N", "of the bootstrap and the random selector", default=0)
    add(
        "--output FOLDER",
        "tables as CSV, verdicts.json, report.md, pictures (default: GAINS-report)",
        type=Path,
    )
    options = parser.parse_args(argv)

    from taopd.diagnose.features import AnalysisSettings
    from taopd.diagnose.gain_analysis import analyse
    from taopd.diagnose.gain_files import read_gains
    from taopd.runs.folder import cannot_write_to, refuse_file
    from taopd.runs.jsonl import write_json, write_text

    gains = read_gains(options.gains)
    measured = Path(os.path.abspath(options.gains))  # "." has no name
    folder = options.output or measured.with_name(f"{measured.name}-report")
    refuse_file(folder, folder)
    # A report.md may be anybody's; one beside verdicts is written anew.
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "verdicts.json").exists():
        raise DataError(f"{folder} holds files that are no report; choose another output folder")
    with CountedProgress() as advance:
        settings = AnalysisSettings(
            cluster=options.cluster,
            num_resamples=options.num_resamples,
            seed=options.seed,
            reference=options.reference,
        )
        analysis = analyse(gains, settings, k=options.k, progress=advance)
    with cannot_write_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in analysis.tables.items():
            write_text(folder / f"{name}.csv", table.to_csv(index=False))
        write_json(folder / "verdicts.json", [asdict(verdict) for verdict in analysis.verdicts])
        write_text(folder / "report.md", _markdown(analysis))
    pictures = _draw(analysis, gains[-1].tokens, folder)
    _print(analysis)
    print(f"report: {folder / 'report.md'} ({len(pictures)} pictures, tables as CSV beside it)")
    return 0


def _draw(analysis: "Analysis", tokens: "pd.DataFrame", folder: Path) -> list[Path]:
    from taopd.report.figures import diagnose as diagnostic

    def part(name: str) -> "pd.DataFrame":
        table = analysis.tables[name]
        return table[table["gain"] == table["gain"].iloc[0]]

    return [
        *diagnostic.draw_gain_against_disagreement(tokens, folder, k=analysis.k),
        *diagnostic.draw_coefficients(part("decomposition"), folder),
        *diagnostic.draw_matched(part("matched_top_n"), folder),
        *diagnostic.draw_q3_gap(part("robustness"), folder),
        *diagnostic.draw_gain_curve(part("gain_curve"), folder, by_step=analysis.by_step),
    ]


def _markdown(analysis: "Analysis") -> str:
    from taopd.report.generated_part import markdown_table

    lines = [f"# What was learnable: {analysis.checkpoint}, K = {analysis.k}", ""]
    rows = [(v.direction, v.unit, f"**{v.verdict}**", v.sentence) for v in analysis.verdicts]
    lines += markdown_table(("KL", "unit", "verdict", "in words"), rows, texts=4)
    names = ("gain_vs_disagreement", "coefficients", "matched_top_n", "q3_gap", "gain_curve")
    lines += ["", *(f"![{name}]({name}.png)" for name in names), ""]
    return "\n".join(lines)


def _print(analysis: "Analysis") -> None:
    from rich.table import Table

    from taopd.report.console import plain_console
    from taopd.report.sections.learnable import CLAIM_HEADS, claim_rows

    table = Table(
        title=f"{analysis.checkpoint}: claims over forward and reverse KL, nats and share"
    )
    claim, *numbers = CLAIM_HEADS
    table.add_column(claim, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for cells in claim_rows([asdict(verdict) for verdict in analysis.verdicts]):
        table.add_row(*cells)
    plain_console().print(table)
