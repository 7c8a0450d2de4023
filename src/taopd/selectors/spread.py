"""Which selections can be made where the rows are, and which need every row in one place.

A table that is spread over ranks (`SignalTable.ranks`) is never joined: a rank scores its own rows, and the
cut is found by bounded searches. What has no such form is refused, with what to do about it.
"""

from taopd.errors import ConfigError
from taopd.selectors.registry import Selector
from taopd.selectors.settings import Rules
from taopd.selectors.weighting import resolve_weighting


def whole_table_reasons(how: Rules, chosen: Selector) -> list[str]:
    """What of a selection reads more than its own rows, counts and order statistics; empty: nothing."""
    weighting = resolve_weighting(how.weighting)
    return [
        reason
        for holds, reason in (
            (not chosen.local, f"the selector {chosen.name!r}"),
            (how.draw != "top", f"draw={how.draw!r}"),
            (how.position_cost > 0, "position_cost"),
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
            "response alone says so with register_selector(..., local=True)"
        )
