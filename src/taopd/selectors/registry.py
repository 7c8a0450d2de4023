"""The selectors by name, and how to add one.

A selector is a score, which end of it is kept, and who may be chosen at all. Yours is one function:

    @register_selector("sharp")
    def sharp(view):
        return view.d * (1 - view.h)

and then `select(table, selector="sharp")`; unregistered ones are named by path,
"package.module:function", and arithmetic on registered ones is a selector too
(`taopd.selectors.expressions`). Keyword-only numbers of the function are parameters:
"dial(beta=0.5)".
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, ShapeError, TaopdError
from taopd.selectors import formulas, literature, within_completion
from taopd.selectors.normalize import NormalizedView

Score = Callable[[NormalizedView], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """How rows are ordered and which of them are candidates."""

    name: str
    scores: Score
    """[N] scores; finite on every valid row."""
    ascending: bool = False
    """Keep the lowest scores; ties then go to the larger position. [R15]"""
    candidates: Score | None = None
    """bool [N]; None: every valid row. Fewer candidates than the budget are all kept. [R16]"""
    weighted: bool = False
    """The score, which must then be >= 0, is also the weight of a kept row, as it is: nothing
    scales the weights to a mean of one, so their size changes the step size."""
    lead: Score | None = None
    """round-half-even(gamma * n) rows are taken by this score first, the rest by `scores`."""
    reference_scores: Score | None = None
    """Used instead of `scores` under rules="reference", where the released code differs."""
    weights: Score | None = None
    """Weights of kept rows, >= 0, where they are not the score."""
    needs: tuple[str, ...] = ()
    """Further signals it reads (`taopd.signals.KNOWN_SIGNALS`); a table without them is refused."""
    bounded: bool = False
    """Scores lie in [0, 1]: an expression takes them as they are and normalizes all others."""
    local: bool = False
    """A score reads its row and its completion alone, and no further signal than `needs`: ranks can score
    their own rows, which a generation batch above `gather_limit` asks for. The view's columns, quadrants,
    `normalized` and `uniform` are of the whole batch in any case."""

    @property
    def plain(self) -> bool:
        """Nothing but a score, higher first: what may stand in an expression."""
        return not self.ascending and self.candidates is None and self.lead is None


SELECTORS: dict[str, Selector] = {}
"""Every registered selector by name."""

REFERENCE_NAMES = {
    "ca_softor": "teachability+entropy",
    "compatibility": "compatibility",
    "dincompat_high": "incompatible",
    "divergence": "divergence",
    "dlearn_high": "teachability",
    "entropy": "entropy",
    "full": "full",
    "q3": "q3",
    "q3_dincompat_high": "q3_incompatible_high",
    "q3_highc": "q3_high_c",
    "q3_lowc": "q3_low_c",
    "q3_teachability_high": "q3_teachability_high",
    "q3_teachability_low": "q3_teachability_low",
    "random": "random",
    "split_budget_ca": "split",
    "teachability": "teachability",
    "tip": "tip",
}
"""The released code's method names and ours. [docs/math.md]"""


def register_selector(
    name: str,
    *,
    ascending: bool = False,
    candidates: Score | None = None,
    weighted: bool = False,
    lead: Score | None = None,
    reference_scores: Score | None = None,
    weights: Score | None = None,
    needs: Sequence[str] = (),
    bounded: bool = False,
    local: bool = False,
) -> Callable[[Score], Score]:
    """Decorator: make a function of a `NormalizedView` selectable as `name`; options as in
    `Selector`.

    The function is returned as it was. Running the same definition again (a notebook cell) replaces
    it.

    Raises:
        ConfigError: if the name belongs to another function, or `needs` is text.
    """

    # Text is a sequence of its letters.
    if isinstance(needs, str):
        raise ConfigError(f"selector {name!r}: needs={needs!r} must be a tuple: ({needs!r},)")

    def register(function: Score) -> Score:
        # A notebook cell that runs again defines a new function of the same module and name.
        known = SELECTORS.get(name)
        if known is not None and _origin(known.scores) != _origin(function):
            raise ConfigError(
                f"selector {name!r} is already {_origin(known.scores)}; "
                "register yours under another name"
            )
        SELECTORS[name] = Selector(
            name=name,
            scores=function,
            ascending=ascending,
            candidates=candidates,
            weighted=weighted,
            lead=lead,
            reference_scores=reference_scores,
            weights=weights,
            needs=tuple(needs),
            bounded=bounded,
            local=local,
        )
        return function

    return register


def _origin(function: Score) -> str:
    module = getattr(function, "__module__", "?")
    return f"{module}:{getattr(function, '__qualname__', repr(function))}"


# Not local: iw, fade (running sums over the batch), fire and dash (a maximum, a mean of the batch).
_builtin = partial(register_selector, local=True)

# Of the paper, two variants of its own among them: raw C and the frozen scorer
_builtin("teachability", bounded=True)(formulas.teachability)
_builtin("teachability_raw_c", bounded=True)(formulas.teachability_raw_c)
_builtin(
    "teachability_frozen",
    needs=("initial_disagreement", "initial_compatibility"),
    bounded=True,
)(formulas.teachability_frozen)
_builtin(
    "teachability+entropy",
    reference_scores=formulas.teachability_entropy_reference,
    bounded=True,
)(formulas.teachability_entropy)
_builtin("tip", bounded=True)(formulas.tip)
_builtin("entropy", bounded=True)(formulas.entropy)
_builtin("divergence", bounded=True)(formulas.divergence)
_builtin("compatibility", bounded=True)(formulas.compatibility)
_builtin("incompatible", bounded=True)(formulas.incompatible)
_builtin("random", bounded=True)(formulas.random)
_builtin("full", bounded=True)(formulas.full)
_builtin("split", lead=formulas.entropy)(formulas.low_entropy_teachability)
_builtin("q3", candidates=formulas.in_q3)(formulas.low_entropy_teachability)
_builtin("q3_high_c", candidates=formulas.in_q3)(formulas.compatibility)
_builtin("q3_low_c", candidates=formulas.in_q3, ascending=True)(formulas.compatibility)
_builtin("q3_teachability_high", candidates=formulas.in_q3)(formulas.teachability)
_builtin("q3_teachability_low", candidates=formulas.in_q3, ascending=True)(formulas.teachability)
_builtin("q3_incompatible_high", candidates=formulas.in_q3)(formulas.incompatible)

# Work around the paper, and controls
_SAMPLED = ("student_logprobs", "teacher_logprobs")
_builtin("bottom", ascending=True)(formulas.teachability)
_builtin("prefix")(literature.prefix)
_builtin("compatible", bounded=True)(literature.compatible)
_builtin("pgt", needs=("log_ratio_variance",))(literature.pgt)
_builtin("ier", needs=("ier",))(literature.ier)
_builtin("corrective", needs=("corrective_mass",), bounded=True)(literature.corrective)
_builtin("reverse_kl", needs=("reverse_kl",))(literature.reverse_kl)
_builtin("dial", needs=_SAMPLED)(literature.dial)
_builtin("opsa", needs=("student_logprobs",))(literature.opsa)
_builtin(
    "selectkd", needs=("student_top1_accepted",), weights=literature.selectkd_weight, bounded=True
)(literature.selectkd)
register_selector("iw", needs=_SAMPLED, weighted=True)(literature.iw)
_builtin("pw", weighted=True, bounded=True)(literature.pw)
register_selector("fire", needs=("teacher_entropy", "teacher_logprobs"), weighted=True)(
    literature.fire
)
_builtin("sure", needs=("student_logprobs",), weighted=True)(literature.sure)
_builtin("bellman", needs=_SAMPLED, bounded=True)(literature.bellman_teachability)
register_selector("dash", needs=_SAMPLED)(literature.dash)
_builtin("extreme", needs=_SAMPLED, candidates=within_completion.in_extreme)(
    within_completion.log_gap
)
_builtin("extremes", needs=_SAMPLED, candidates=within_completion.in_extremes)(
    within_completion.log_gap
)
register_selector(
    "fade", needs=("teacher_margin",), candidates=within_completion.before_fade, bounded=True
)(formulas.teachability)


def checked_scores(chosen: Selector, view: NormalizedView, rules: str) -> Float[Tensor, " N"]:
    """A selector's scores by the rules, float64.

    Raises:
        ShapeError, NumericsError: scores of the wrong shape, not finite, or negative weights.
    """
    function = chosen.scores
    if rules == "reference" and chosen.reference_scores is not None:
        function = chosen.reference_scores
    scores = checked(chosen, called(chosen, function, view), view).double()
    # A NaN has no place in an order; where a sort would put it is not defined.
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


def called(chosen: Selector, function: Score, view: NormalizedView) -> object:
    """What a function of a selector returns.

    Raises:
        ConfigError: a function of the user's raised something; names the line.
    """
    try:
        return function(view)
    except TaopdError:
        raise
    except Exception as error:
        # A mistake of ours keeps its traceback, with parameters or without.
        inner = function.func if isinstance(function, partial) else function
        if str(getattr(inner, "__module__", "")).startswith("taopd."):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"selector {chosen.name!r} raised {type(error).__name__}: {error} ({place.filename}, line "
            f"{place.lineno}); a selector is a function of a NormalizedView, see docs/guide.md"
        ) from error


def checked(chosen: Selector, values: object, view: NormalizedView) -> Tensor:
    """What a selector returned, if it is one value per row.

    Raises:
        ShapeError: it is not.
    """
    # A tensor of another shape might broadcast, and select other rows without a word.
    if not isinstance(values, Tensor) or values.shape != view.h.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"selector {chosen.name!r}: expected a tensor of shape {list(view.h.shape)}, one "
            f"value per row, got {got}"
        )
    # A score decides which tokens train; no gradient flows through that decision.
    return values.detach().to(view.h.device)
