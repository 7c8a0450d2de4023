"""The page's sections."""

from collections.abc import Sequence

from taopd.report.folders import Sources
from taopd.report.page import Section
from taopd.report.rollouts import Rollout


def all_sections(sources: Sources, rollouts: Sequence[Rollout], inspector: str) -> list[Section]:
    """Every section, empty ones included, in the order of the page."""
    return [Section(anchor="inspector", title="Tokens", lead="Every token.", body=inspector)]


def warnings(sources: Sources) -> str:
    """What a reader should know first."""
    return ""
