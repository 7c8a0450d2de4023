"""What a kept row weighs in the loss, given that it was kept.

A weight is not a selection: any selector can decide who trains and any score how much. The reduction
(`taopd.losses`) divides by the sum of the weights or by a count of tokens afterwards.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError, NumericsError
from taopd.selectors.normalize import NormalizedView, scale_of
from taopd.selectors.registry import Selector, called, checked
from taopd.selectors.resolve import resolve_selector

WEIGHTINGS = ("hard", "score", "rank")


def resolve_weighting(weighting: str) -> Selector | None:
    """The selector whose score is the weight; None for one of `WEIGHTINGS`.

    Raises:
        ConfigError: unknown, or not a plain score.
    """
    # Before the registered names: "score" means the selector's own, whatever is registered under it.
    if weighting in WEIGHTINGS:
        return None
    try:
        selector = resolve_selector(weighting)
    except ConfigError as error:
        raise ConfigError(
            f"weighting={weighting!r} is none of {', '.join(WEIGHTINGS)} and no score: {error}"
        ) from error
    if not selector.plain:
        raise ConfigError(f"weighting={weighting!r} is more than a score (candidates or order)")
    return selector


def unit_scores(
    selector: Selector, scores: Float[Tensor, " N"], view: NormalizedView
) -> Float[Tensor, " N"]:
    """Scores in [0, 1], more meaning keep: as they are if bounded, else normalized.

    With normalization "none" negative scores are moved up to 0 first: below it all of them would be 0.
    """
    if view.normalization == "none" and not selector.bounded:
        how: dict[str, Any] = {"rules": view.rules, "ranks": view.table.ranks}
        ends = scale_of(scores, view.table.valid, normalization="minmax", **how)
        scores = scores if ends is None else scores - min(0.0, ends[0])
    scaled = scores if selector.bounded else view.normalized(scores)
    return 1.0 - scaled if selector.ascending else scaled


def kept_weights(
    weighting: str,
    chosen: Selector,
    scores: Float[Tensor, " N"],
    order: Int[Tensor, " N"],
    kept: Bool[Tensor, " N"],
    view: NormalizedView,
) -> Float[Tensor, " N"]:
    """Weight of every row: 0 where not kept, elsewhere by `weighting`.

        hard     1, or the selector's own weight if it has one
        score    the selector's score, in [0, 1]
        rank     1 for the best kept row, falling evenly to 1 / m for the last of m
        NAME     the score of that selector or expression as it is, which must be >= 0

    Raises:
        NumericsError: if a kept row's weight is negative or not finite; names the row.
    """
    other = resolve_weighting(weighting)
    if other is not None:
        weights = checked(other, called(other, other.scores, view), view).double()
    elif weighting == "score":
        weights = unit_scores(chosen, scores, view)
    elif weighting == "rank":
        weights = _rank_weights(order, kept)
    elif chosen.weights is not None:
        weights = checked(chosen, called(chosen, chosen.weights, view), view).double()
    else:
        weights = scores if chosen.weighted else torch.ones_like(scores)
    # A negative weight would train away from the teacher.
    bad = kept & ~((weights >= 0) & weights.isfinite())
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise NumericsError(
            f"selector {chosen.name!r}, weighting {weighting!r}: weight of row {row} is "
            f"{float(weights[row])}; weights must be finite and >= 0"
        )
    return torch.where(kept, weights, 0.0)


def _rank_weights(order: Tensor, kept: Tensor) -> Tensor:
    num_kept = int(kept.sum())
    # A row that min_keep added may be no candidate, and then has no place: it counts as last.
    order = torch.where(kept & (order >= 0), order, order.max() + 1 if order.numel() else 0)
    place = torch.empty_like(order)
    place[order.argsort(stable=True)] = torch.arange(order.shape[0], device=order.device)
    return (num_kept - place).clamp_min(1).double() / max(1, num_kept)
