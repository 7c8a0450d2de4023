"""The sections of the page, in its order; each builds its own body, empty where there is no data."""

from collections.abc import Sequence

from taopd.report.folders import Sources
from taopd.report.rollouts import Rollout
from taopd.report.sections import diagnostic, outcome, runs, selected, training
from taopd.report.sections.section import Section

__all__ = ["Section", "all_sections", "warnings"]


def all_sections(sources: Sources, rollouts: Sequence[Rollout], inspector: str) -> list[Section]:
    """Every section, empty ones included, in the order of the page."""
    return [
        Section(anchor="settings", title="What was run", lead=runs.LEAD, body=runs.body(sources)),
        Section(
            anchor="outcome", title="Outcome", lead=outcome.LEAD, body=outcome.body(sources.studies)
        ),
        Section(
            anchor="budget",
            title="Accuracy by budget",
            lead=outcome.BUDGET_LEAD,
            body=outcome.budget_curve(sources.studies),
        ),
        Section(
            anchor="cost",
            title="What it cost",
            lead=outcome.COST_LEAD,
            body=outcome.against_cost(sources),
        ),
        Section(
            anchor="tokens",
            title="Token by token",
            lead="Which words the teacher got to teach. Point at a token, or walk with the arrow keys: "
            "<kbd>n</kbd> and <kbd>p</kbd> jump between kept tokens.",
            body=inspector,
        ),
        Section(
            anchor="selected",
            title="What was selected",
            lead=selected.LEAD,
            body=selected.body(sources.runs, rollouts),
        ),
        Section(
            anchor="training",
            title="Over the training",
            lead=training.LEAD,
            body=training.body(sources.runs),
        ),
        Section(
            anchor="diagnostic",
            title="Which signals were learnable",
            lead=diagnostic.LEAD,
            body=diagnostic.body(sources),
        ),
        Section(
            anchor="speed",
            title="Speed and memory",
            lead=training.SPEED_LEAD,
            body=training.speed(sources.runs),
        ),
    ]


def warnings(sources: Sources) -> str:
    """What a reader should know before the first number."""
    return runs.warnings(sources)
