"""Selectors: from a table of signals to the tokens that train."""

from taopd.selectors.registry import (
    REFERENCE_NAMES,
    SELECTORS,
    Selector,
    register_selector,
    resolve_selector,
)
from taopd.selectors.scores import NORMALIZATIONS, RULES, NormalizedView, normalized_view
from taopd.selectors.select import Selection, select

__all__ = [
    "NORMALIZATIONS",
    "REFERENCE_NAMES",
    "RULES",
    "SELECTORS",
    "NormalizedView",
    "Selection",
    "Selector",
    "normalized_view",
    "register_selector",
    "resolve_selector",
    "select",
]
