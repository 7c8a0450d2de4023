"""Choose which tokens of a whole rollout batch train: budget, order, ties, minimum per response.

The choice is global: the table holds every prompt, sample, rank and micro-batch, so the kept set
does not depend on how the work was divided. One selection is a few sorts; nothing here visits rows
one by one.

Not here: the loss and its denominator. They see `Selection.weights` only.

Source: METHOD section 3 (budget, min_keep), R12-R18.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.selectors import scores as score_functions
from taopd.selectors.registry import Score, Selector, resolve_selector
from taopd.selectors.scores import NormalizedView, normalized_view
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
    """float64; 0 where not kept, else 1, or the score of a weighted selector."""
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


def budget_count(budget: float, num_valid: int) -> int:
    """Rows a budget pays for: n = max(1, ceil(budget * N)), a plain double product, at most N.

    Example:
        >>> budget_count(0.07, 100), budget_count(0.55, 100)
        (8, 56)
    """
    if num_valid == 0:
        return 0
    return min(num_valid, max(1, math.ceil(budget * num_valid)))


def seeded_generator(seed: int, step: int) -> torch.Generator:
    """CPU generator for one step, the same on every rank; neighboring seeds and steps share
    nothing."""
    digest = hashlib.blake2b(f"{seed},{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def select(
    table: SignalTable,
    *,
    selector: str | Score | Selector = "teachability",
    budget: float = 0.05,
    min_keep: int = 0,
    normalization: str = "quantile",
    gamma: float = 0.5,
    seed: int = 0,
    step: int = 0,
    rules: str = "paper",
) -> Selection:
    """Keep the best max(1, ceil(budget N)) of the N valid rows of a whole rollout batch.

    Ties: smaller position in the response, then earlier response (ascending selectors: larger
    position). `budget=1.0` keeps every valid row whatever the selector, which is plain distillation
    (R12).

    Args:
        budget: share of valid rows, in (0, 1]; the reference's rules take more than 1 as 1.
        min_keep: at least this many rows of every response that has them, added to the budget:
            best of the selector's own order, its candidates first (reference: best soft OR, R17).
        gamma: share of the budget that `split` spends on entropy.
        rules: "paper", or "reference" for R8-R18 of the released code.

    Raises:
        ConfigError: a setting out of range, or an unknown selector.
        ShapeError, NumericsError: scores of the wrong shape, not finite, or negative weights.
    """
    _check_settings(budget, min_keep, gamma, rules)
    chosen = resolve_selector(selector)
    view = normalized_view(
        table, normalization=normalization, rules=rules, generator=seeded_generator(seed, step)
    )
    valid = table.valid
    num_valid = int(valid.sum())
    num_budget = budget_count(budget, num_valid)
    if num_valid == 0:  # R14
        scores = torch.zeros_like(view.h)
        ranks = torch.full_like(table.response, -1, dtype=torch.int64)
        return _selection(chosen, view, scores, ranks, valid.clone(), num_valid, num_budget)
    scores = _scores(chosen, view, rules)
    candidates = valid
    if chosen.candidates is not None:
        candidates = valid & _checked(chosen, chosen.candidates(view), view).bool()
    order = _order(chosen, view, scores, candidates, round(gamma * num_budget))
    ranks = torch.full_like(table.response, -1, dtype=torch.int64)
    ranks[order] = torch.arange(order.shape[0], device=order.device)
    if chosen.name == "full" or budget >= 1:  # R12
        kept = valid.clone()
    else:
        kept = torch.zeros_like(valid)
        kept[order[:num_budget]] = True
        if min_keep > 0:
            if rules == "reference":
                soft_or = score_functions.teachability_entropy_reference(view)
                preference = ranking(soft_or, valid, table)
            else:
                others = ranking(scores, valid & ~candidates, table, ascending=chosen.ascending)
                preference = torch.cat([order, others])
            _top_up(kept, preference, table.response, min_keep)
    return _selection(chosen, view, scores, ranks, kept, num_valid, num_budget)


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


def _top_up(kept: Tensor, preference: Tensor, response: Tensor, min_keep: int) -> None:
    """Add each response's most preferred unkept rows until it has min_keep, or no row left; in
    place."""
    groups, group = response.unique(return_inverse=True)
    num_kept = torch.zeros_like(groups).index_add_(0, group, kept.to(groups.dtype))
    spare = preference[~kept[preference]]
    spare = spare[group[spare].argsort(stable=True)]  # by response, preference inside
    sizes = torch.bincount(group[spare], minlength=groups.shape[0])
    starts = sizes.cumsum(0) - sizes
    nth = torch.arange(spare.shape[0], device=spare.device) - starts[group[spare]]
    kept[spare[nth < min_keep - num_kept[group[spare]]]] = True


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


def _selection(
    chosen: Selector,
    view: NormalizedView,
    scores: Tensor,
    ranks: Tensor,
    kept: Tensor,
    num_valid: int,
    num_budget: int,
) -> Selection:
    weight = scores if chosen.weighted else torch.ones_like(view.h)
    return Selection(
        weights=torch.where(kept, weight, torch.zeros_like(weight)),
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
    )


def _check_settings(budget: float, min_keep: int, gamma: float, rules: str) -> None:
    if not budget > 0 or not math.isfinite(budget):  # R13
        raise ConfigError(f"budget={budget} must be above 0; 0.05 keeps one valid token in twenty")
    if budget > 1 and rules == "paper":
        raise ConfigError(
            f"budget={budget} must be in (0, 1]; it is a share, so five percent is 0.05"
        )
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 0:
        raise ConfigError(f"min_keep={min_keep!r} must be a whole number of tokens >= 0")
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma={gamma} must be in [0, 1]")
