"""Markdown pages: tables, and the part of a page that a command writes, between two markers."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from taopd.errors import DataError
from taopd.runs.jsonl import write_text

BEGIN, END = "<!-- generated -->", "<!-- end of generated -->"


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int | Collection[int] = 1
) -> list[str]:
    """The lines of a table of texts and numbers; numbers stand at the right of their column.

    Args:
        texts: how many columns from the left are texts, or which ones, counted from 0.
    """
    which = range(texts) if isinstance(texts, int) else texts
    rule = "|".join("---" if column in which else "---:" for column in range(len(heads)))
    return [f"| {' | '.join(heads)} |", f"|{rule}|", *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    # A name of the user's may hold the mark between two cells, or the end of a line.
    words = (" ".join(re.sub(r"(?<!\\)\|", r"\\|", cell).splitlines()) for cell in cells)
    return f"| {' | '.join(words)} |"


def write_generated(path: Path, body: str, *, title: str = "") -> None:
    """Put `body` between the markers of a page; what stands outside of them stays as it is.

    Args:
        title: of a page that does not exist yet.

    Raises:
        DataError: the page has no such place: nothing of it is overwritten.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(
            f"{path}: lacks the line {BEGIN} or, after it, {END}: add both where the tables belong"
        )
    write_text(path, f"{before}{BEGIN}\n{body}\n{END}{after}")
