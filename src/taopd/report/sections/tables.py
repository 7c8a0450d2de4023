"""Tables of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from taopd.report.text import escape
from taopd.runs.shares import per_cent

LONG = 40
"""Characters of a row's name that stay on one line: longer ones would push the numbers out of sight."""


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()
) -> str:
    """An HTML table that scrolls inside itself on a narrow screen; cells are text, and escaped.

    Args:
        numeric: columns that are set to the right.
    """

    def cell(tag: str, index: int, text: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kind = "n" if index in numeric else "long" if index == 0 and len(text) > LONG else ""
        style = f' class="{kind}"' if kind else ""
        return f"<{tag}{scope}{style}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, text) for index, text in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell('td', index, text) for index, text in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {escape(heads[0])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent, a dash where it is unknown."""
    return "–" if value is None else per_cent(value, digits)


def span(low: float | None, high: float | None) -> str:
    """An interval of shares in per cent, a dash where it is unknown."""
    if low is None or high is None:
        return "–"
    return f"{100 * low:.1f} to {100 * high:.1f}"


def points(difference: float) -> str:
    """A difference of two shares in points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def points_span(low: float | None, high: float | None) -> str:
    """An interval of such a difference, cut at what is possible; a dash where it is unknown."""
    if low is None or high is None:
        return "–"
    return f"{points(max(low, -1.0))} to {points(min(high, 1.0))}"


def first_of(shown: int, total: int, what: str) -> str:
    """A note that a part of the page shows the first of many alone; empty if it shows them all."""
    return f'<p class="note">The first {shown} of {total} {what}.</p>' if shown < total else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; one with an empty body is left out."""

    anchor: str
    title: str
    lead: str
    """HTML, as `body` is: whoever makes it escapes what is data."""
    body: str
