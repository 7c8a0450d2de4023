"""Stochastic selection: exactly n rows, each with a known probability that grows with its score.

Why not the n best: a hard choice changes the objective, so a comparison with training on everything mixes
"fewer tokens" with "other tokens". With probabilities pi and weights 1 / pi the sum over kept rows has the
expectation of the sum over all candidates (Horvitz and Thompson, 1952).

Source: NAT, arXiv 2603.06619 (random token masks with weights 1 / p); systematic sampling: Madow (1949).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def inclusion_probabilities(
    scores: Float[Tensor, " N"], candidates: Bool[Tensor, " N"], *, num_kept: int, floor: float
) -> Float[Tensor, " N"]:
    """pi_i = n (floor / M + (1 - floor) s_i / sum s), capped at 1; over M candidates, 0 elsewhere.

    What a cap cuts off goes to the others in proportion, so that pi sums to n. Equal scores, or all
    zero, give n / M.

    Args:
        scores: >= 0.
        num_kept: n, at most M.
        floor: share of the draws that ignores the score; above 0 every candidate can be drawn.
    """
    num_candidates = int(candidates.sum())
    # In double, because the sum of many small probabilities must come to n.
    own = scores[candidates].double().clamp_min(0.0)
    total = own.sum()
    share = own / total if bool(total > 0) else torch.full_like(own, 1.0 / max(1, num_candidates))
    size = floor / max(1, num_candidates) + (1.0 - floor) * share
    capped = torch.zeros_like(size, dtype=torch.bool)
    probability = torch.zeros_like(size)
    # A cap raises the others, which may then reach 1 too; every pass caps at least one row or ends.
    while True:
        left, rest = num_kept - int(capped.sum()), size.masked_fill(capped, 0.0)
        free = rest.sum()
        # Nothing left to share in proportion: the uncapped rows are all equal to 0 in score.
        even = (~capped).double() / max(1, int((~capped).sum()))
        probability = left * (rest / free if bool(free > 0) else even)
        over = (probability >= 1.0) & ~capped
        if not bool(over.any()):
            break
        capped |= over
    probability = torch.where(capped, 1.0, probability)
    full = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
    full[candidates] = probability
    return full


def draw_rows(
    probability: Float[Tensor, " N"], num_kept: int, generator: torch.Generator
) -> Bool[Tensor, " N"]:
    """Exactly `num_kept` rows, row i with probability pi_i; the pi sum to `num_kept`.

    Systematic sampling in random order: lay the pi end to end, throw a comb of unit spacing at them.
    """
    # Without the random order, neighbors would never be drawn together.
    order = torch.randperm(probability.shape[0], generator=generator).to(probability.device)
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    ends = probability[order].cumsum(0)
    if ends.numel():
        # Rounding in the sum must not lose or add a tooth.
        ends = (ends / ends[-1].clamp_min(1e-300) * num_kept).clamp_max(num_kept)
    teeth = (ends + offset).floor()
    hit = teeth > torch.cat([teeth.new_zeros(1), teeth[:-1]])
    kept = torch.zeros_like(probability, dtype=torch.bool)
    kept[order] = hit & (probability[order] > 0)
    return kept
