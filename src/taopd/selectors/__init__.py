"""Selectors: from a table of signals to the tokens that train."""

from taopd.errors import check_budget
from taopd.selectors.budget import SCHEDULES, SCOPES, scheduled_budget
from taopd.selectors.normalize import NORMALIZATIONS, RULES, NormalizedView, normalized_view
from taopd.selectors.registry import (
    REFERENCE_NAMES,
    SELECTORS,
    Selector,
    register_selector,
)
from taopd.selectors.resolve import resolve_selector
from taopd.selectors.select import Selection, select
from taopd.selectors.settings import (
    DRAWS,
    Rules,
    check_needs,
    check_settings,
    check_share,
    check_spread,
)
from taopd.selectors.weighting import WEIGHTINGS, resolve_weighting

__all__ = [
    "DRAWS",
    "NORMALIZATIONS",
    "REFERENCE_NAMES",
    "RULES",
    "SCHEDULES",
    "SCOPES",
    "SELECTORS",
    "WEIGHTINGS",
    "NormalizedView",
    "Rules",
    "Selection",
    "Selector",
    "check_budget",
    "check_needs",
    "check_settings",
    "check_share",
    "check_spread",
    "normalized_view",
    "register_selector",
    "resolve_selector",
    "resolve_weighting",
    "scheduled_budget",
    "select",
]
