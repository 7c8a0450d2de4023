"""Saved documents of the kit's stages, and tables of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taopd.report.generated_part import markdown_table


def load(stage: str, results: Path) -> dict[str, Any]:
    """The newest saved result of a stage, of a GPU; a stage that failed has none."""
    paths = [p for p in results.glob(f"accelerator-{stage}__*.json") if "cpu" not in p.name]
    documents = [json.loads(path.read_text()) for path in paths]
    documents = [document for document in documents if "result" in document]
    if not documents:
        raise SystemExit(f"{results} has no result of stage {stage} on a GPU")
    return max(documents, key=lambda document: document["utc"])


def about(document: dict[str, Any]) -> str:
    """Command, commit, machine and time of a result, and its note."""
    note = f" {document['note']}" if "note" in document else ""
    return (
        f"`{document['command']}`, commit {document['commit']}, {document['machine']}, "
        f"{document['utc']}.{note}"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table as one text; numbers to the right."""
    return "\n".join(markdown_table(heads, rows))
