"""Choose which tokens of a whole rollout batch train: budget, order, ties, minimum per response.

The choice is global: the table holds every prompt, sample, rank and micro-batch, so the kept set does not
depend on how the work was divided.

Not here: the loss and its denominator. They see `Selection.weights` only.

Source: METHOD section 3 (budget, min_keep), R12-R18.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.selectors import formulas
from taopd.selectors.budget import (
    affordable,
    budget_count,
    response_counts,
    top_up,
    within_quota,
)
from taopd.selectors.calibration import Calibration, calibrated_count, updated
from taopd.selectors.normalize import NormalizedView, normalized_view
from taopd.selectors.registry import Score, Selector, checked, checked_scores
from taopd.selectors.resolve import resolve_selector
from taopd.selectors.sampling import (
    draw_rows,
    inclusion_probabilities,
    random_agreements,
    seeded_generator,
    teachable,
)
from taopd.selectors.settings import Rules, check_needs, check_settings, check_spread
from taopd.selectors.topk import best_rows, ranking, score_at
from taopd.selectors.weighting import kept_weights, mean_one, unit_scores
from taopd.signals import SignalTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Result of `select` for the N rows of a table, with what a log wants to know about it.

    Aligned example, budget 0.5 of four valid rows:

        kept     F    T    T    F    F
        scores  .1   .9   .5   .3   .8
        ranks    3    0    1    2   -1     the last row may not train
        weights .0   1.   1.   .0   .0
    """

    weights: Float[Tensor, " N"]
    """float64; 0 where not kept, else by `weighting`, over the probability of a drawn row."""
    kept: Bool[Tensor, " N"]
    scores: Float[Tensor, " N"]
    """float64, as the selector gave them; 0 where there was no valid row at all."""
    ranks: Int[Tensor, " N"]
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
    calibration: Calibration | None = None
    """memory: what the next batch should be given."""


def select(
    table: SignalTable,
    *,
    selector: str | Score | Selector = "teachability",
    normalization: str = "quantile",
    seed: int = 0,
    step: int = 0,
    calibration: Calibration | None = None,
    **rules: Any,
) -> Selection:
    """Keep the best max(1, ceil(budget N)) of the N valid rows of a whole rollout batch.

    A table that is one rank's part (`table.ranks`) gives this rank's part of the same selection; then every
    rank must call it.

    Ties: smaller position in the response, then earlier response (ascending selectors: larger
    position). `budget=1.0` keeps every valid row whatever the selector, which is plain distillation
    (R12).

    Args:
        calibration: that of the batch before, with `memory`; None: there was none.
        rules: fields of `Rules`: budget, min_keep, gamma, rules, scope, draw, weighting, ...

    Raises:
        ConfigError: a setting out of range, an unknown selector, or one that reads a signal which the
            table does not hold.
        ShapeError, NumericsError: scores of the wrong shape, not finite, or negative weights.
    """
    how = Rules(**rules)
    chosen = resolve_selector(selector)
    check_settings(how, chosen)
    check_needs(chosen, table)
    if not table.ranks.alone:
        check_spread(how, chosen)
    remembered = calibration if how.memory is not None else None
    view = normalized_view(
        table,
        normalization=normalization,
        rules=how.rules,
        generator=seeded_generator(seed, step),
        scales=None if remembered is None else remembered.scales,
    )
    if not table.ranks.any(table.valid):  # R14
        return _empty(view, remembered)
    scores = checked_scores(chosen, view, how.rules)
    candidates = _candidates(chosen, view, how.floor)
    quota, num_budget = _quota(how, table)
    if how.position_cost > 0:
        value = unit_scores(chosen, scores, view)
        candidates = affordable(
            value, candidates, table.position, num_budget=num_budget, cost=how.position_cost
        )
    first = _first(chosen, view, candidates, round(how.gamma * num_budget))
    order = _order(chosen, view, scores, candidates, first)
    num_replay = round(how.replay * num_budget)
    probability, num_kept = None, num_budget - num_replay
    if how.memory is not None and table.ranks.total(order.shape[0]):
        num_kept, calibration = _calibrated(
            how.memory, chosen, view, scores, candidates, num_budget, remembered
        )
    if chosen.name == "full" or how.budget >= 1:  # R12
        kept = table.valid.clone()
    elif how.draw == "proportional":
        num_kept = min(num_budget, order.shape[0])
        value = unit_scores(chosen, scores, view)
        probability = inclusion_probabilities(
            value, candidates, num_kept=num_kept, floor=how.draw_floor
        )
        kept = draw_rows(probability, num_kept, view.generator)
    else:
        kept = _best(chosen, view, scores, candidates, first, order, num_kept, quota)
        if how.min_keep > 0:
            preference = _preference(chosen, view, scores, candidates, order)
            top_up(kept, preference, table.response, how.min_keep)
        kept |= random_agreements(table, table.valid & ~kept, num_replay, view.generator)
    places = _places(order, table)
    weights = _weights(how, chosen, scores, places, kept, probability, view)
    selection = _selection(view, scores, places, kept, weights, num_budget, probability)
    return selection if how.memory is None else replace(selection, calibration=calibration)


def _places(order: Tensor, table: SignalTable) -> Tensor:
    places = torch.full_like(table.response, -1, dtype=torch.int64)
    if table.ranks.alone:
        places[order] = torch.arange(order.shape[0], device=order.device)
    return places


def _calibrated(
    memory: float,
    chosen: Selector,
    view: NormalizedView,
    scores: Tensor,
    candidates: Tensor,
    num_budget: int,
    remembered: Calibration | None,
) -> tuple[int, Calibration]:
    """How many rows reach the remembered threshold, and what the next batch should be given."""
    ranks, num_kept, ascending = view.table.ranks, num_budget, chosen.ascending
    if remembered is not None:
        num_kept = calibrated_count(
            scores[candidates], remembered, num_budget, ascending=ascending, ranks=ranks
        )
    place = min(num_budget, ranks.total(candidates.sum())) - 1
    sign = 1 if ascending else -1
    threshold = score_at(scores, candidates, view.table, place, sign=sign)
    return num_kept, updated(remembered, view.scales, threshold, memory=memory)


def _candidates(chosen: Selector, view: NormalizedView, floor: float) -> Tensor:
    """Rows that may be kept."""
    rows = view.table.valid
    if chosen.candidates is not None:
        rows = rows & checked(chosen, chosen.candidates(view), view).bool()
    return rows & teachable(view.table, floor) if floor > 0 else rows


def _quota(how: Rules, table: SignalTable) -> tuple[Tensor | None, int]:
    """Per row, the rows its response may keep, and the sum; None where only the sum counts."""
    if how.scope == "response":
        return response_counts(how.budget, table)
    return None, budget_count(how.budget, table.ranks.total(table.valid.sum()))


def _preference(
    chosen: Selector, view: NormalizedView, scores: Tensor, candidates: Tensor, order: Tensor
) -> Tensor:
    """In which order rows are added for `min_keep`."""
    if view.rules == "reference":
        soft_or = formulas.teachability_entropy_reference(view)
        return ranking(soft_or, view.table.valid, view.table)
    rest = view.table.valid & ~candidates
    return torch.cat([order, ranking(scores, rest, view.table, ascending=chosen.ascending)])


def _weights(
    how: Rules,
    chosen: Selector,
    scores: Tensor,
    places: Tensor,
    kept: Tensor,
    probability: Tensor | None,
    view: NormalizedView,
) -> Tensor:
    weights = kept_weights(how.weighting, chosen, scores, places, kept, view)
    if probability is not None:
        largest = how.draw_clip * float((probability > 0).sum()) / max(1.0, float(kept.sum()))
        inverse = (1.0 / torch.where(kept, probability, 1.0)).clamp_max(largest)
        weights = weights * inverse
    return mean_one(weights, kept, view.table.ranks) if how.mean_one else weights


def _first(
    chosen: Selector, view: NormalizedView, candidates: Tensor, num_lead: int
) -> tuple[Tensor, Tensor]:
    """The selector's other score, and the rows that are taken by it before all others."""
    if chosen.lead is None:
        return torch.zeros_like(view.h), torch.zeros_like(candidates)
    lead = checked(chosen, chosen.lead(view), view)
    return lead, best_rows(lead, candidates, view.table, num_lead)


def _order(
    chosen: Selector,
    view: NormalizedView,
    scores: Tensor,
    candidates: Tensor,
    first: tuple[Tensor, Tensor],
) -> Tensor:
    """This rank's candidates, best first."""
    lead, rows = first
    rest = ranking(scores, candidates & ~rows, view.table, ascending=chosen.ascending)
    return torch.cat([ranking(lead, rows, view.table), rest])


def _best(
    chosen: Selector,
    view: NormalizedView,
    scores: Tensor,
    candidates: Tensor,
    first: tuple[Tensor, Tensor],
    order: Tensor,
    num_kept: int,
    quota: Tensor | None,
) -> Tensor:
    """This rank's part of the first `num_kept` rows in the order of all ranks, or of each response's."""
    if quota is not None or view.table.ranks.alone:
        response = view.table.response
        best = order[:num_kept] if quota is None else within_quota(order, quota, response)
        return torch.zeros_like(candidates).index_fill_(0, best, True)
    lead, rows = first
    num_first = view.table.ranks.total(rows.sum())
    if num_kept <= num_first:
        return best_rows(lead, rows, view.table, num_kept)
    left, end = candidates & ~rows, chosen.ascending
    return rows | best_rows(scores, left, view.table, num_kept - num_first, ascending=end)


def _empty(view: NormalizedView, calibration: Calibration | None) -> Selection:
    nothing = torch.zeros_like(view.h)
    places = torch.full_like(view.table.response, -1, dtype=torch.int64)
    selection = _selection(view, nothing, places, view.table.valid.clone(), nothing, 0, None)
    return replace(selection, calibration=calibration)


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
        ranks=places,
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
