"""The paper's scores: what a position is worth, as a function of the normalized signals."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.selectors.normalize import NormalizedView

REACH_FLOOR, LEAST_REACH = 0.05, 0.01
"""D below which a token is left to the hold, nats; reach below which it is left to it whatever D."""


def teachability(view: NormalizedView) -> Float[Tensor, " N"]:
    """Learnable disagreement D^L = D~ C~. [eq. 5, 12]"""
    return view.d * view.c


def teachability_raw_c(view: NormalizedView) -> Float[Tensor, " N"]:
    """D~ C with C as it is: a share of mass needs no scale.

    Where C hardly varies, eq. 11 stretches a spread of 1e-5 to [0, 1], and D~ C~ drops large disagreements
    for it. Source: ours.
    """
    compatibility = view.table.compatibility.double()
    return view.d * torch.where(view.table.valid, compatibility, 0.0)


def teachability_frozen(view: NormalizedView) -> Float[Tensor, " N"]:
    """D~ C~ of the initial student in place of the present one.

    What is selected does not follow from what was learned, only from where the samples go. Source: the
    frozen scorer of arXiv 2609.22109.
    """
    d0, c0 = view.signal("initial_disagreement"), view.signal("initial_compatibility")
    return view.normalized(d0) * view.normalized(c0)


def incompatible(view: NormalizedView) -> Float[Tensor, " N"]:
    """Incompatible disagreement D^I = D~ (1 - C~). [eq. 5, 12]"""
    return view.d * (1 - view.c)


def teachability_entropy(view: NormalizedView) -> Float[Tensor, " N"]:
    """Soft OR of entropy and teachability: H~ + s - H~ s with s = D~ C~. [eq. 16]"""
    s = teachability(view)
    return view.h + s - view.h * s


def teachability_entropy_reference(view: NormalizedView) -> Float[Tensor, " N"]:
    """The released code's soft OR: H~ + s - H~ s with s = Norm(D C). [docs/math.md]"""
    return view.h + view.dc - view.h * view.dc


def low_entropy_teachability(view: NormalizedView) -> Float[Tensor, " N"]:
    """(1 - H~) Norm(D C): the score of q3 and of the second half of split. [docs/math.md]"""
    return (1 - view.h) * view.dc


def tip(view: NormalizedView) -> Float[Tensor, " N"]:
    """Soft OR of entropy and divergence: H~ + D~ - H~ D~. [docs/math.md]"""
    return view.h + view.d - view.h * view.d


def entropy(view: NormalizedView) -> Float[Tensor, " N"]:
    """H~."""
    return view.h


def divergence(view: NormalizedView) -> Float[Tensor, " N"]:
    """D~."""
    return view.d


def compatibility(view: NormalizedView) -> Float[Tensor, " N"]:
    """C~."""
    return view.c


def random(view: NormalizedView) -> Float[Tensor, " N"]:
    """Uniform on [0, 1), one draw per row of the global table: the matched-budget control."""
    return view.uniform()


def full(view: NormalizedView) -> Float[Tensor, " N"]:
    """1 everywhere."""
    return torch.ones_like(view.h)


def worth_reaching(
    disagreement: Float[Tensor, " N"], reach: Float[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """D >= 0.05 nats, D as it is, where r >= 0.01: what `method: reach` may select; r of `judged_reach`.

    Without a floor an exhausted selection goes on driving Adam. A floor on D r instead would leave what is
    hardly within reach half taught. Source: ours, docs/results/reach_forms.md.
    """
    return (disagreement >= REACH_FLOOR) & (reach >= LEAST_REACH)


def not_held_back(d: Float[Tensor, " N"], held_back: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """D~ (1 - h)^2: the order of what `method: reach` selects; h = f + g, g of `losses.held_share`.

    While the start is held, D~ r^2: a token that the hold takes back is taught in vain, and would keep the
    budget from what can be learned. Once it is let go, D~. Source: ours, docs/results/reach_forms.md.
    """
    return d * (1.0 - held_back).square()


def in_q3(view: NormalizedView) -> Bool[Tensor, " N"]:
    """Rows of quadrant 3, low entropy and high divergence."""
    return view.quadrant == 3
