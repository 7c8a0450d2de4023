"""What the scripts about the labs share: progress of jobs, a results file of one row a line, and its page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.panels import Line, draw_panels
from taopd.report.generated_part import write_generated
from taopd.runs.jsonl import write_text


def print_jobs(done: int, total: int) -> None:
    """One line on the finished jobs."""
    print(f"{done} of {total} jobs", flush=True)


def write_rows(path: Path, about: Mapping[str, Any], name: str, rows: Iterable[Any]) -> None:
    """Write one JSON document: `about`, and under `name` the rows, each on a line of its own.

    Raises:
        ValueError: a row holds a number that is not finite.
    """
    body = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    head = json.dumps(about)[:-1] + (", " if about else "")
    write_text(path, f'{head}"{name}": [\n{body}\n]}}\n')


def write_page(
    output: Path, panels: Mapping[str, Sequence[Line]], parts: Sequence[str], *, title: str, of: str
) -> None:
    """Draw the panels and write the page beside a results file.

    Args:
        parts: of the page: first what its numbers are, then what follows the picture.
        of: what the picture shows, in words.
    """
    draw_panels(panels, output.with_suffix(".png"))
    about, *tables = parts
    body = "\n\n".join([about, f"![{of}]({output.stem}.png)", *tables]) + "\n"
    write_generated(output.with_suffix(".md"), body, title=title)


def curves_of(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The accuracies of an arm at its checkpoints, from its results: of greedy and of sampled texts."""
    names = {"greedy": "accuracy_curve", "sampled": "accuracy_sampled_curve"}
    return {how: [value for _, value in row[name]] for how, name in names.items()}
