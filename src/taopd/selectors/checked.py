"""What a selector returns, checked before it decides anything: shape, finite scores, weights >= 0."""

from jaxtyping import Float
from torch import Tensor

from taopd.errors import NumericsError, ShapeError
from taopd.selectors.normalize import NormalizedView
from taopd.selectors.registry import Selector


def checked_scores(chosen: Selector, view: NormalizedView, rules: str) -> Float[Tensor, " N"]:
    """A selector's scores by the rules, float64.

    Raises:
        ShapeError, NumericsError: scores of the wrong shape, not finite, or negative weights.
    """
    function = chosen.scores
    if rules == "reference" and chosen.reference_scores is not None:
        function = chosen.reference_scores
    scores = checked(chosen, function(view), view).double()
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


def checked(chosen: Selector, values: object, view: NormalizedView) -> Tensor:
    """What a selector returned, if it is one value per row.

    Raises:
        ShapeError: it is not.
    """
    if not isinstance(values, Tensor) or values.shape != view.h.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"selector {chosen.name!r}: expected a tensor of shape {list(view.h.shape)}, one "
            f"value per row, got {got}"
        )
    return values.detach().to(view.h.device)
