"""The sections of the page, in its order; each builds its own body, empty where there is no data."""

from collections.abc import Sequence

from taopd.report.folders import Sources
from taopd.report.rollouts import Rollout
from taopd.report.sections import (
    accuracy,
    budget_and_cost,
    evaluated,
    learnable,
    learning_rates,
    runs,
    selected,
    training,
)
from taopd.report.sections.tables import Section

__all__ = ["Section", "all_sections"]


def all_sections(sources: Sources, rollouts: Sequence[Rollout], inspector: str) -> list[Section]:
    """Every section, empty ones included, in the order of the page."""
    words = (
        "Completions token by token, shaded by a signal; kept tokens are underlined. Point at a token or "
        "use the arrow keys; <kbd>n</kbd> and <kbd>p</kbd> go to the next and the previous kept token."
    )
    studies, folders = sources.studies, sources.runs
    outcome = accuracy.body(studies) + evaluated.body(sources.evaluations)
    parts = (
        ("settings", "What was run", runs.LEAD, runs.body(sources)),
        ("outcome", "Outcome", accuracy.LEAD, outcome),
        ("rates", "Learning rates", learning_rates.LEAD, learning_rates.body(studies)),
        (
            "budget",
            "Accuracy by budget",
            budget_and_cost.BUDGET_LEAD,
            budget_and_cost.budget_curve(studies),
        ),
        (
            "cost",
            "Accuracy by cost",
            budget_and_cost.COST_LEAD,
            budget_and_cost.against_cost(sources),
        ),
        ("tokens", "Token by token", words, inspector),
        ("selected", "What was selected", selected.LEAD, selected.body(folders, rollouts)),
        ("training", "Over the training", training.LEAD, training.body(folders)),
        ("diagnostic", "Which signals were learnable", learnable.LEAD, learnable.body(sources)),
        ("speed", "Speed and memory", training.SPEED_LEAD, training.speed(folders)),
    )
    return [
        Section(anchor=anchor, title=title, lead=lead, body=body)
        for anchor, title, lead, body in parts
    ]
