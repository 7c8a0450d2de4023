"""A part of the page."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; one with an empty body is left out."""

    anchor: str
    title: str
    lead: str
    """HTML, as `body` is: whoever makes it escapes what is data."""
    body: str
