"""What the scripts about the labs share: the progress of their jobs, and a results file of one row a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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


def curves_of(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The accuracies of an arm at its checkpoints, from its results: of greedy and of sampled texts."""
    names = {"greedy": "accuracy_curve", "sampled": "accuracy_sampled_curve"}
    return {how: [value for _, value in row[name]] for how, name in names.items()}
