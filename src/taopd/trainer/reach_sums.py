"""What `method: reach` counts over a generation batch: how long the start is held, and what it divides by."""

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.losses import needs_teacher_distribution, start_share
from taopd.selectors import Selection
from taopd.selectors.formulas import LEAST_REACH, REACH_FLOOR
from taopd.signals import SignalTable

WITHIN_SHARE = 0.2
"""Share of the disagreement within reach from which on the start is let go as late as may be."""
LATEST = 0.75
"""Share of the run after which nothing is held at the start but foreign ends: what is learned late needs
the rest to settle."""


def used_share(selection: Selection, loss: str, distribution: bool) -> float:
    """Selected tokens over those by which `method: reach` divides: the budget, used up or not, or all valid.

    The loss at a sampled token says nothing about the tokens that were not drawn. Multiplied by 1 / budget
    its noise drowns out the hold, unless a baseline takes it off: measured in docs/results/default.md.

    Args:
        distribution: the teacher's full distribution is at hand.
    """
    # A fixed advantage has no baseline: it would be all of it.
    quiet = needs_teacher_distribution(loss) or (distribution and loss == "sampled_reverse_kl")
    whole = selection.num_budget if quiet else selection.num_valid
    return min(1.0, selection.num_kept / max(1, whole))


def start_shares(
    table: SignalTable, reach: Float[Tensor, " N"], *, step: int, num_steps: int
) -> Float[Tensor, " N"]:
    """lambda of every token: let go over the first half of a run, or as late as over three quarters of it
    while what is within reach is not learned.

        l(1/2)                          where r < 0.01;  l(x) = max(0, 1 - step / (x num_steps))
        max(l(1/2), min(u, l(3/4)))     else,  u = min(1, w / (0.2 d)) min(1, w / (0.05 nats)),
                                        w = mean of D r, d = mean of D

    A student that takes over words it hardly said meets contexts that are new to it, and its answers are
    wrong there until it knows what follows: w and its share of d rise. Then the start is held again. What
    is too far away to be selected has no other teaching than that of the hold. Source: ours,
    docs/results/default.md.

    Args:
        num_steps: of the whole run; 0: not known, then 1.
    """
    d = torch.where(table.valid, table.disagreement, 0.0).double().clamp_min(0.0)
    sums = table.ranks.sums(torch.stack([(d * reach).sum(), d.sum(), table.valid.double().sum()]))
    within, total = (sums[:2] / sums[2].clamp_min(1.0)).tolist()
    share = within / total if total > 0.0 else 0.0
    unlearned = min(1.0, share / WITHIN_SHARE) * min(1.0, within / REACH_FLOOR)
    early, late = (start_share(step, num_steps, over=over) for over in (0.5, LATEST))
    shares = torch.full_like(reach, max(early, min(unlearned, late)), dtype=torch.float64)
    return shares.masked_fill(reach < LEAST_REACH, early)
