"""The settings of a selection, and which of them fit each other, a selector and a table."""

import math
from dataclasses import dataclass

from taopd.errors import ConfigError, check_budget, require, require_known
from taopd.selectors.budget import SCOPES
from taopd.selectors.registry import SELECTORS, Selector
from taopd.selectors.weighting import resolve_weighting
from taopd.signals import SignalTable

DRAWS = ("top", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a selection is made once rows have scores; the defaults are the paper's."""

    budget: float = 0.1
    """Share of valid rows, in (0, 1]; the reference's rules take more than 1 as 1."""
    min_keep: int = 0
    """At least this many rows of every completion that has them, added to the budget: best of the
    selector's own order, its candidates first (reference: best soft OR, R17)."""
    gamma: float = 0.5
    """Share of the budget that `split` spends on entropy."""
    rules: str = "paper"
    """"paper", or "reference" for R8-R18 of the released code."""
    scope: str = "global"
    """"response": the budget holds in every completion by itself. "teacher": in those of every teacher."""
    draw: str = "top"
    """"proportional": draw with probability in proportion to the score, weight 1 / probability."""
    draw_floor: float = 0.1
    """Share of the draws that ignores the score."""
    draw_clip: float = 10.0
    """Largest weight of a drawn row, as a multiple of the mean weight N / n."""
    weighting: str = "hard"
    """See `weighting.kept_weights`."""


SHARE = "in [0, 1]"


def check_share(share: float, name: str) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        ConfigError: names the setting.
    """
    require(0.0 <= share <= 1.0, name, share, SHARE)


def check_ranges(how: Rules) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: names the setting.
    """
    if how.rules == "paper" or not 1.0 < how.budget < math.inf:  # R13: more than 1 counts as 1
        check_budget(how.budget)
    is_count = isinstance(how.min_keep, int) and not isinstance(how.min_keep, bool)
    for holds, name, expected in (
        (is_count and how.min_keep >= 0, "min_keep", "a whole number >= 0"),
        (0.0 <= how.gamma <= 1.0, "gamma", SHARE),
        (0.0 <= how.draw_floor <= 1.0, "draw_floor", SHARE),
        (how.draw_clip >= 1.0, "draw_clip", "at least 1"),
    ):
        require(holds, name, getattr(how, name), expected)
    require_known("scope", how.scope, SCOPES)
    require_known("draw", how.draw, DRAWS)


def check_settings(how: Rules, chosen: Selector) -> None:
    """Refuse values out of range, and combinations that have no meaning.

    Raises:
        ConfigError: names the setting.
    """
    check_ranges(how)
    # The weight 1 / probability is unbiased only if nothing else decides whether a row is kept.
    if how.draw == "proportional" and (how.min_keep or how.scope != "global" or chosen.lead):
        raise ConfigError(
            "draw='proportional' needs min_keep=0, scope='global' and a selector with one score: "
            "otherwise a row's probability is not known"
        )
    # The lead takes a share of one budget of the batch, and there is none here.
    if how.scope != "global" and chosen.lead is not None:
        raise ConfigError(
            f"scope={how.scope!r} does not work with {chosen.name!r}, which divides one budget (split)"
        )


def check_needs(selector: Selector, table: SignalTable) -> None:
    """Refuse a selector that reads a signal which the table does not hold.

    Raises:
        ConfigError: names the signal and the selectors that this table is enough for.
    """
    missing = sorted(set(selector.needs) - set(table.extra))
    if missing:
        enough = sorted(
            name for name, known in SELECTORS.items() if set(known.needs) <= set(table.extra)
        )
        raise ConfigError(
            f"selector {selector.name!r} reads the signal {missing[0]!r}, which this table does not hold: "
            f"pass needs={missing} to signal_table, with a source that gives it. "
            f"Possible without: {', '.join(enough)}"
        )


def whole_table_reasons(how: Rules, chosen: Selector) -> list[str]:
    """What of a selection reads more than its own rows, counts and order statistics; empty: nothing."""
    weighting = resolve_weighting(how.weighting)
    return [
        reason
        for holds, reason in (
            (not chosen.local, f"the selector {chosen.name!r}"),
            (how.draw != "top", f"draw={how.draw!r}"),
            (how.weighting == "rank", "weighting='rank'"),
            (weighting is not None and not weighting.local, f"weighting={how.weighting!r}"),
        )
        if holds
    ]


def check_spread(how: Rules, chosen: Selector) -> None:
    """Refuse a selection that cannot be made on a spread table.

    Raises:
        ConfigError: names the settings, and the way out.
    """
    reasons = whole_table_reasons(how, chosen)
    if reasons:
        raise ConfigError(
            f"{' and '.join(reasons)} cannot be computed where the rows are, and a generation batch of "
            "more than gather_limit tokens is not sent to every rank: raise gather_limit (some 20 bytes a "
            "token on every rank), or choose another; a selector of yours that reads its own row and "
            "completion alone says so with register_selector(..., local=True)"
        )
