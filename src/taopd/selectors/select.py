"""Choose which tokens of a whole rollout batch train: budget, order, ties, minimum per response.

The choice is global: the table holds every prompt, sample, rank and micro-batch, so the kept set
does not depend on how the work was divided. One selection is a few sorts; nothing here visits rows
one by one.

Not here: the loss and its denominator. They see `Selection.weights` only.

Source: METHOD section 3 (budget, min_keep), R12-R18.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import NumericsError, ShapeError
from taopd.selectors import scores as score_functions
from taopd.selectors.budgets import (
    affordable,
    budget_count,
    response_counts,
    top_up,
    within_quota,
)
from taopd.selectors.calibration import Calibration, calibrated_count, updated
from taopd.selectors.draws import draw_rows, inclusion_probabilities
from taopd.selectors.registry import Score, Selector
from taopd.selectors.replay import random_agreements, teachable
from taopd.selectors.resolve import resolve_selector
from taopd.selectors.rules import Rules, check_needs, check_settings
from taopd.selectors.scores import NormalizedView, normalized_view
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
    """0-based place in the order of selection; -1 for a row that was no candidate."""
    num_valid: int
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


def seeded_generator(seed: int, step: int) -> torch.Generator:
    """CPU generator for one step, the same on every rank; neighboring seeds and steps share
    nothing."""
    digest = hashlib.blake2b(f"{seed},{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


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
    remembered = calibration if how.memory is not None else None
    view = normalized_view(
        table,
        normalization=normalization,
        rules=how.rules,
        generator=seeded_generator(seed, step),
        scales=None if remembered is None else remembered.scales,
    )
    if not bool(table.valid.any()):  # R14
        return _empty(view, remembered)
    scores = _scores(chosen, view, how.rules)
    candidates = _candidates(chosen, view, how.floor)
    quota, num_budget = _quota(how, table)
    if how.position_cost > 0:
        value = unit_scores(chosen, scores, view)
        candidates = affordable(
            value, candidates, table.position, num_budget=num_budget, cost=how.position_cost
        )
    order = _order(chosen, view, scores, candidates, round(how.gamma * num_budget))
    ranks = torch.full_like(table.response, -1, dtype=torch.int64)
    ranks[order] = torch.arange(order.shape[0], device=order.device)
    num_replay = round(how.replay * num_budget)
    probability, num_kept = None, num_budget - num_replay
    if how.memory is not None and order.shape[0]:
        best = scores[order]
        if remembered is not None:
            num_kept = calibrated_count(best, remembered, num_budget, ascending=chosen.ascending)
        calibration = updated(
            remembered, view.scales, float(best[:num_budget][-1]), memory=how.memory
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
        kept = torch.zeros_like(table.valid)
        best = order[:num_kept] if quota is None else within_quota(order, quota, table.response)
        kept[best] = True
        if how.min_keep > 0:
            preference = _preference(chosen, view, scores, candidates, order)
            top_up(kept, preference, table.response, how.min_keep)
        kept |= random_agreements(table, table.valid & ~kept, num_replay, view.generator)
    weights = _weights(how, chosen, scores, ranks, kept, probability, view)
    selection = _selection(view, scores, ranks, kept, weights, num_budget, probability)
    return selection if how.memory is None else replace(selection, calibration=calibration)


def ranking(
    scores: Float[Tensor, " N"],
    rows: Bool[Tensor, " N"],
    table: SignalTable,
    *,
    ascending: bool = False,
) -> Int[Tensor, " M"]:
    """Indices of the M flagged rows, best first, in the total order of METHOD R15."""
    index = rows.nonzero()[:, 0]
    if index.shape[0] == 0:
        return index
    position, response = table.position[index].long(), table.response[index].long()
    place = position.max() - position if ascending else position
    ties = place * (response.max() + 1) + response
    index = index[ties.argsort(stable=True)]
    return index[scores[index].argsort(descending=not ascending, stable=True)]


def _candidates(chosen: Selector, view: NormalizedView, floor: float) -> Tensor:
    """Rows that may be kept."""
    rows = view.table.valid
    if chosen.candidates is not None:
        rows = rows & _checked(chosen, chosen.candidates(view), view).bool()
    return rows & teachable(view.table, floor) if floor > 0 else rows


def _quota(how: Rules, table: SignalTable) -> tuple[Tensor | None, int]:
    """Per row, the rows its response may keep, and the sum; None where only the sum counts."""
    if how.scope == "response":
        return response_counts(how.budget, table)
    return None, budget_count(how.budget, int(table.valid.sum()))


def _preference(
    chosen: Selector, view: NormalizedView, scores: Tensor, candidates: Tensor, order: Tensor
) -> Tensor:
    """In which order rows are added for `min_keep`."""
    if view.rules == "reference":
        soft_or = score_functions.teachability_entropy_reference(view)
        return ranking(soft_or, view.table.valid, view.table)
    rest = view.table.valid & ~candidates
    return torch.cat([order, ranking(scores, rest, view.table, ascending=chosen.ascending)])


def _weights(
    how: Rules,
    chosen: Selector,
    scores: Tensor,
    ranks: Tensor,
    kept: Tensor,
    probability: Tensor | None,
    view: NormalizedView,
) -> Tensor:
    weights = kept_weights(how.weighting, chosen, scores, ranks, kept, view)
    if probability is not None:
        largest = how.draw_clip * float((probability > 0).sum()) / max(1.0, float(kept.sum()))
        inverse = (1.0 / torch.where(kept, probability, 1.0)).clamp_max(largest)
        weights = weights * inverse
    return mean_one(weights, kept) if how.mean_one else weights


def _order(
    chosen: Selector, view: NormalizedView, scores: Tensor, candidates: Tensor, num_lead: int
) -> Tensor:
    if chosen.lead is None:
        return ranking(scores, candidates, view.table, ascending=chosen.ascending)
    lead = _checked(chosen, chosen.lead(view), view)
    first = ranking(lead, candidates, view.table)[:num_lead]
    rest = candidates.clone()
    rest[first] = False
    return torch.cat([first, ranking(scores, rest, view.table, ascending=chosen.ascending)])


def _scores(chosen: Selector, view: NormalizedView, rules: str) -> Tensor:
    function = chosen.scores
    if rules == "reference" and chosen.reference_scores is not None:
        function = chosen.reference_scores
    scores = _checked(chosen, function(view), view).double()
    bad = ~scores.isfinite() & view.table.valid
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise NumericsError(
            f"selector {chosen.name!r}: score of row {row} is {float(scores[row])}; scores of "
            "valid rows must be finite (pass `candidates` to leave rows out)"
        )
    if chosen.weighted and bool(((scores < 0) & view.table.valid).any()):
        row = int(((scores < 0) & view.table.valid).nonzero()[0])
        raise NumericsError(
            f"selector {chosen.name!r}: weight of row {row} is {float(scores[row])}; "
            "a weighted selector's scores must be >= 0"
        )
    return scores


def _checked(chosen: Selector, values: object, view: NormalizedView) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != view.h.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"selector {chosen.name!r}: expected a tensor of shape {list(view.h.shape)}, one "
            f"value per row, got {got}"
        )
    return values.detach().to(view.h.device)


def _empty(view: NormalizedView, calibration: Calibration | None) -> Selection:
    nothing = torch.zeros_like(view.h)
    ranks = torch.full_like(view.table.response, -1, dtype=torch.int64)
    selection = _selection(view, nothing, ranks, view.table.valid.clone(), nothing, 0, None)
    return replace(selection, calibration=calibration)


def _selection(
    view: NormalizedView,
    scores: Tensor,
    ranks: Tensor,
    kept: Tensor,
    weights: Tensor,
    num_budget: int,
    probability: Tensor | None,
) -> Selection:
    num_valid = int(view.table.valid.sum())
    return Selection(
        weights=weights,
        kept=kept,
        scores=scores,
        ranks=ranks,
        num_valid=num_valid,
        num_budget=num_budget,
        kept_fraction=int(kept.sum()) / num_valid if num_valid else 0.0,
        h=view.h,
        d=view.d,
        c=view.c,
        dc=view.dc,
        learnable=score_functions.teachability(view),
        incompatible=score_functions.incompatible(view),
        quadrant=view.quadrant,
        probability=probability,
    )
