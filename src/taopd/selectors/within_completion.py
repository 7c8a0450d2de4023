"""Who may be chosen, decided inside each completion: its extreme tokens, and what comes before it fades.

What: candidates [N] of selectors, from columns that a table holds. Delta = log p_T(y) - log p_S(y) at the
sampled token y. Not here: sentences; a table knows tokens, not text.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.selectors.literature import completion_max, delta, earlier_sum, response_sum
from taopd.selectors.normalize import NormalizedView
from taopd.signals import SignalTable

SMALLEST_VARIANCE = 1e-12
"""Below it a completion counts as constant, and nothing is cut."""


def log_gap(view: NormalizedView) -> Float[Tensor, " N"]:
    """|Delta| at the sampled token, nats."""
    return delta(view).abs()


def in_extreme(view: NormalizedView) -> Bool[Tensor, " N"]:
    """The one token of every completion with the largest |Delta|. Source: arXiv 2609.04565 (its max rule)."""
    return first_largest(log_gap(view), view.table)


def in_extremes(view: NormalizedView) -> Bool[Tensor, " N"]:
    """The token of the largest and that of the smallest Delta of every completion.

    Source: arXiv 2609.04565 (its min-max rule).
    """
    gap = delta(view)
    return first_largest(gap, view.table) | first_largest(-gap, view.table)


def before_fade(view: NormalizedView) -> Bool[Tensor, " N"]:
    """Tokens of a completion up to the one after which the teacher's margin falls for good.

        x_t     the teacher's margin on the student's top-K (`signals.derived.teacher_margin`), t = 1 .. n
        R(k)    squares around the means of x_1 .. x_k and of x_(k+1) .. x_n;  R(n): around the one mean
        cut at  the k with the smallest R among those whose later mean is below the earlier one, if
                n ln R(n) - n ln R(k) > 2 ln n

    The penalty is that of BIC for a second mean and a place. Without such a k nothing is cut. The idea, a
    downward change point of the margin found by BIC, is that of arXiv 2605.13643, which averages over
    sentences first; the definition of the margin and the test on single tokens are ours.
    """
    table, x = view.table, view.signal("teacher_margin")
    ones = torch.ones_like(x)
    n, total, squares = (response_sum(column, table) for column in (ones, x, x * x))
    k = earlier_sum(ones, table) + 1.0
    early = earlier_sum(x, table) + x
    rest = (n - k).clamp_min(1.0)
    split = (squares - early**2 / k - (total - early) ** 2 / rest).clamp_min(SMALLEST_VARIANCE)
    whole = (squares - total**2 / n.clamp_min(1.0)).clamp_min(SMALLEST_VARIANCE)
    gain = n * (whole.log() - split.log()) - 2.0 * n.clamp_min(1.0).log()
    falls = (k < n) & ((total - early) / rest < early / k) & (gain > 0)
    best = first_largest(torch.where(falls, gain, -1.0), table) & falls
    # A completion without a cut has no such row, and its own last position is as good as any.
    last = torch.where(best, table.position.double(), -1.0)
    cut = completion_max(last, table)
    return table.valid & ((cut < 0) | (table.position <= cut))


def first_largest(values: Float[Tensor, " N"], table: SignalTable) -> Bool[Tensor, " N"]:
    """The valid row of every completion with the largest value; the earliest among equals."""
    at_most = completion_max(torch.where(table.valid, values, -torch.inf), table)
    largest = table.valid & (values == at_most)
    early = completion_max(torch.where(largest, -table.position.double(), -torch.inf), table)
    return largest & (-table.position.double() == early)
