"""Choose which tokens of a whole rollout batch train: budget, order, ties, minimum per completion.

The choice is global: the table holds every prompt, sample, rank and micro-batch, so the kept set does not
depend on how the work was divided.

Not here: the loss and its denominator. They see `Selection.weights` only.

Source: docs/math.md; R12-R18 of docs/released-code.md.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.selectors import formulas
from taopd.selectors.budget import (
    budget_count,
    completion_counts,
    teacher_counts,
    top_up,
    within_quota,
)
from taopd.selectors.normalize import NormalizedView, normalized_view, seeded_generator
from taopd.selectors.registry import Score, Selector, called, checked, checked_scores
from taopd.selectors.resolve import resolve_selector
from taopd.selectors.sampling import draw_rows, inclusion_probabilities
from taopd.selectors.settings import Rules, check_needs, check_settings, check_spread
from taopd.selectors.topk import best_rows, ranking
from taopd.selectors.weighting import kept_weights, resolve_weighting, unit_scores
from taopd.signals import TEACHER, SignalTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Result of `select` for the N rows of a table, with what a log wants to know about it.

    Aligned example, budget 0.5 of four valid rows:

        kept     F    T    T    F    F
        scores  .1   .9   .5   .3   .8
        order    3    0    1    2   -1     the last row may not train
        weights .0   1.   1.   .0   .0
    """

    weights: Float[Tensor, " N"]
    """float64; 0 where not kept, else by `weighting`, over the probability of a drawn row."""
    kept: Bool[Tensor, " N"]
    scores: Float[Tensor, " N"]
    """float64, as the selector gave them; 0 where there was no valid row at all."""
    order: Int[Tensor, " N"]
    """0-based place in the order of selection; -1 for a row that was no candidate, and where the table is
    spread over ranks: a place there is known only of the cut."""
    num_valid: int
    """On all ranks, as are `num_kept`, `num_budget` and `kept_fraction`."""
    num_kept: int
    num_budget: int
    """n by the budget rule; `min_keep` adds to it, a lack of candidates leaves part of it
    unused."""
    kept_fraction: float
    """Realized: kept rows / valid rows; 0 where there are none."""
    h: Float[Tensor, " N"]
    d: Float[Tensor, " N"]
    c: Float[Tensor, " N"]
    dc: Float[Tensor, " N"]
    learnable: Float[Tensor, " N"]
    """D^L = D~ C~."""
    incompatible: Float[Tensor, " N"]
    """D^I = D~ (1 - C~)."""
    quadrant: Int[Tensor, " N"]
    """int8 1..4, 0 outside the population; see `NormalizedView`."""
    probability: Float[Tensor, " N"] | None = None
    """draw="proportional": with which each row could be kept; None where nothing was drawn."""


def select(
    table: SignalTable,
    *,
    selector: str | Score | Selector = "teachability",
    normalization: str = "quantile",
    seed: int = 0,
    step: int = 0,
    allowed: Bool[Tensor, " N"] | None = None,
    **rules: Any,
) -> Selection:
    """Keep the best max(1, ceil(budget N)) of the N valid rows of a whole rollout batch.

    A table that is one rank's part (`table.ranks`) gives this rank's part of the same selection; then every
    rank must call it.

    Ties: smaller position in the completion, then earlier completion (ascending selectors: larger
    position). `budget=1.0` keeps every valid row whatever the selector, which is plain distillation
    (R12).

    Args:
        allowed: rows that any selector may choose from; default all that are valid. The scales and the budget
            are those of all valid rows; where fewer are allowed than the budget, fewer are kept.
        rules: fields of `Rules`: budget, min_keep, gamma, rules, scope, draw, weighting, ...

    Raises:
        ConfigError: a setting out of range, an unknown selector, or one that reads a signal which the
            table does not hold.
        ShapeError, NumericsError: scores of the wrong shape, not finite, or negative weights.
    """
    how = Rules(**rules)
    chosen = resolve_selector(selector)
    check_settings(how, chosen)
    for reader in chosen, resolve_weighting(how.weighting):
        if reader is not None:
            check_needs(reader, table)
    if not table.ranks.alone:
        check_spread(how, chosen)
    view = normalized_view(
        table,
        normalization=normalization,
        rules=how.rules,
        generator=seeded_generator(seed, step),
    )
    if not table.ranks.any(table.valid):  # R14
        return _nothing(view)
    # Scores, candidates and the draw take numbers from one generator: their order is part of the result.
    scores = checked_scores(chosen, view, how.rules)
    quota, counts = _quota(how, table)
    num_budget = sum(counts)
    candidates = _candidates(chosen, view, allowed)
    order = _order(chosen, view, scores, candidates, num_lead=round(how.gamma * num_budget))
    kept, probability = _cut(how, chosen, view, order, quota, counts)
    weights = _weights(how, chosen, view, order, kept, probability)
    return _selection(view, scores, order.places(table), kept, weights, num_budget, probability)


class _Order(NamedTuple):
    """This rank's candidates in the order of selection: by the selector's lead score first, if it has one."""

    scores: Float[Tensor, " N"]
    candidates: Bool[Tensor, " N"]
    lead: Float[Tensor, " N"] | None
    by_lead: Bool[Tensor, " N"]
    """Candidates that are taken by the lead score, before all others."""
    best_first: Int[Tensor, " M"]
    """Indices of the candidates."""

    def places(self, table: SignalTable) -> Int[Tensor, " N"]:
        """0-based place of every row; -1 where it is no candidate, or not known on one rank."""
        places = torch.full_like(table.completion, -1, dtype=torch.int64)
        if table.ranks.alone:
            index = self.best_first
            places[index] = torch.arange(index.shape[0], device=index.device)
        return places


def _quota(how: Rules, table: SignalTable) -> tuple[Tensor | None, list[int]]:
    """Per row, the rows its completion may keep, else None; and what the budget pays for, in all or of every
    teacher."""
    if how.scope == "response":
        quota, total = completion_counts(how.budget, table)
        return quota, [total]
    if how.scope == "teacher":
        return None, teacher_counts(how.budget, table)
    return None, [budget_count(how.budget, table.ranks.total(table.valid.sum()))]


def _candidates(
    chosen: Selector, view: NormalizedView, allowed: Bool[Tensor, " N"] | None
) -> Bool[Tensor, " N"]:
    """Rows that may be kept."""
    valid = view.table.valid if allowed is None else view.table.valid & allowed
    if chosen.candidates is None:
        return valid
    return valid & checked(chosen, called(chosen, chosen.candidates, view), view).bool()


def _order(
    chosen: Selector, view: NormalizedView, scores: Tensor, candidates: Tensor, *, num_lead: int
) -> _Order:
    """The candidates, best first; `num_lead` rows of all ranks go by the lead score."""
    table, lead, by_lead = view.table, None, torch.zeros_like(candidates)
    # The lead score takes its share of the whole budget first (`split`), and the rest go by `scores`.
    if chosen.lead is not None:
        lead = checked(chosen, called(chosen, chosen.lead, view), view)
        by_lead = best_rows(lead, candidates, table, num_lead)
    best_first = ranking(scores, candidates & ~by_lead, table, ascending=chosen.ascending)
    if lead is not None:
        best_first = torch.cat([ranking(lead, by_lead, table), best_first])
    return _Order(scores, candidates, lead, by_lead, best_first)


def _cut(
    how: Rules,
    chosen: Selector,
    view: NormalizedView,
    order: _Order,
    quota: Tensor | None,
    counts: list[int],
) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"] | None]:
    """The rows that are kept, and the probability of each where they are drawn."""
    table = view.table
    # R12: plain distillation trains on every valid row, also on those that are no candidates.
    if chosen.name == "full" or how.budget >= 1:
        return table.valid.clone(), None
    if how.draw == "proportional":
        num_kept = min(sum(counts), order.best_first.shape[0])
        probability = inclusion_probabilities(
            unit_scores(chosen, order.scores, view),
            order.candidates,
            num_kept=num_kept,
            floor=how.draw_floor,
        )
        return draw_rows(probability, num_kept, view.generator), probability
    if quota is not None:
        kept = torch.zeros_like(order.candidates)
        kept[within_quota(order.best_first, quota, table.completion)] = True
    elif how.scope == "teacher":
        # One search a teacher, so that a table spread over ranks is cut as a whole one is.
        kept = torch.zeros_like(order.candidates)
        for teacher, count in enumerate(counts):
            own = order.candidates & (table.extra[TEACHER] == teacher)
            kept |= best_rows(order.scores, own, table, count, ascending=chosen.ascending)
    else:
        kept = _best(chosen, table, order, sum(counts))
    # After the cut: these rows come on top of the budget and take no other row's place.
    if how.min_keep > 0:
        top_up(kept, _preference(chosen, view, order), table.completion, how.min_keep)
    return kept, None


def _best(chosen: Selector, table: SignalTable, order: _Order, num_kept: int) -> Bool[Tensor, " N"]:
    """This rank's part of the first `num_kept` rows in the order of all ranks."""
    if table.ranks.alone:
        kept = torch.zeros_like(order.candidates)
        kept[order.best_first[:num_kept]] = True
        return kept
    # No rank knows the whole order; each finds the cut with the others and marks its own rows.
    by_lead = order.by_lead
    num_lead = table.ranks.total(by_lead.sum())
    if order.lead is not None and num_kept <= num_lead:
        return best_rows(order.lead, by_lead, table, num_kept)
    rest, ascending = order.candidates & ~by_lead, chosen.ascending
    return by_lead | best_rows(order.scores, rest, table, num_kept - num_lead, ascending=ascending)


def _preference(chosen: Selector, view: NormalizedView, order: _Order) -> Int[Tensor, " M"]:
    """In which order rows are added for `min_keep`."""
    table = view.table
    # R17: the released code tops up by its best score, whatever the selector.
    if view.rules == "reference":
        return ranking(formulas.teachability_entropy_reference(view), table.valid, table)
    others = table.valid & ~order.candidates
    rest = ranking(order.scores, others, table, ascending=chosen.ascending)
    return torch.cat([order.best_first, rest])


def _weights(
    how: Rules,
    chosen: Selector,
    view: NormalizedView,
    order: _Order,
    kept: Tensor,
    probability: Tensor | None,
) -> Float[Tensor, " N"]:
    """What every row weighs: 0 where it is not kept, over its probability where it was drawn."""
    if how.weighting == "hard" and not chosen.weighted and chosen.weights is None:
        weights = kept.double()
    else:
        places = order.places(view.table)
        weights = kept_weights(how.weighting, chosen, order.scores, places, kept, view)
    if probability is None:
        return weights
    # One row of a small probability must not decide the whole step.
    largest = how.draw_clip * float((probability > 0).sum()) / max(1.0, float(kept.sum()))
    return weights * (1.0 / torch.where(kept, probability, 1.0)).clamp_max(largest)


def _nothing(view: NormalizedView) -> Selection:
    # R14: without a row that may train there is no scale, no score and no draw.
    zeros = torch.zeros_like(view.h)
    places = torch.full_like(view.table.completion, -1, dtype=torch.int64)
    return _selection(view, zeros, places, view.table.valid.clone(), zeros, 0, None)


def _selection(
    view: NormalizedView,
    scores: Tensor,
    places: Tensor,
    kept: Tensor,
    weights: Tensor,
    num_budget: int,
    probability: Tensor | None,
) -> Selection:
    ranks = view.table.ranks
    num_valid, num_kept = ranks.total(view.table.valid.sum()), ranks.total(kept.sum())
    return Selection(
        weights=weights,
        kept=kept,
        scores=scores,
        order=places,
        num_valid=num_valid,
        num_kept=num_kept,
        num_budget=num_budget,
        kept_fraction=num_kept / num_valid if num_valid else 0.0,
        h=view.h,
        d=view.d,
        c=view.c,
        dc=view.dc,
        learnable=formulas.teachability(view),
        incompatible=formulas.incompatible(view),
        quadrant=view.quadrant,
        probability=probability,
    )
