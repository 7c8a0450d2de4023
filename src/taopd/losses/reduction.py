"""From a selection to the weight of every token in the loss: the reduction, with its global denominator.

A loss is sum_i w_i l_i. The w_i hold everything about the reduction: what the selector decided, what the
mean is over, and a denominator counted after selection over all micro-batches and ranks. So a micro-batch
only ever sums, and 1 x 64 and 4 x 16 give the same loss.

Source: token mean, arXiv 2605.26844 eq. 7; sample mean, the released code (docs/math.md).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks, uniform_part
from taopd.errors import require

LEAST_RELEASE = 100
"""Steps over which the start is let go at least."""


def reduction_weights(
    weights: Float[Tensor, " N"],
    completion: Int[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    *,
    reduction: str = "token_mean",
    denominator: str = "selected",
    used: float = 1.0,
    ranks: Ranks = ALONE,
) -> Float[Tensor, " N"]:
    """Divide selection weights by the global denominator; N runs over the whole generation batch, or over
    the part of it that is on this rank.

        token_mean:  w_i / sum_j w_j                 (denominator="selected")
                     w_i / number of valid tokens    (denominator="completion")
        sample_mean: the same per completion, then divided by the number of completions that have a row; one
                     in which nothing was kept counts as a zero, as in the released code.

    All zero where nothing is kept.

    Args:
        used: share of the budget that was used, by which a token mean over the selected is lowered: a mean
            would give what is left the whole step. Of the tokens, not of their weights, which may be scores.

    Raises:
        ConfigError: for an unknown reduction or denominator.
    """
    for name, value, (one, other) in (
        ("reduction", reduction, ("token_mean", "sample_mean")),
        ("denominator", denominator, ("selected", "completion")),
    ):
        require(value in (one, other), name, value, f"{one!r} or {other!r}")
    counted = weights if denominator == "selected" else valid.to(weights.dtype)
    if reduction == "token_mean":
        total = _nonzero(ranks.sums(counted.sum()))
        return weights / total * (used if denominator == "selected" else 1.0)
    groups, index = torch.unique(completion, return_inverse=True)
    totals = counted.new_zeros(len(groups)).index_add_(0, index, counted)
    return weights / _nonzero(totals)[index] / max(1, ranks.total(len(groups)))


def anchor_weights(
    kept: Bool[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    completion: Int[Tensor, " N"],
    *,
    fraction: float,
    responses: float = 1.0,
    seed: int,
    step: int,
    ranks: Ranks = ALONE,
) -> Float[Tensor, " N"]:
    """Weights of the anchor KL(student || reference student) on a random share of the unselected tokens.

        w_i = 1 / (fraction * number of valid tokens)  on the drawn tokens, 0 elsewhere

    Two stages: a share `responses` of the completions is drawn, and in these enough tokens that every
    unselected token has the probability `fraction`. The reference's forward runs on the drawn completions
    alone. Horvitz-Thompson: in expectation the sum over all unselected tokens, as a mean over completion
    tokens. Reproducible from (seed, step) whatever the number of ranks.

    Args:
        fraction: at most `responses`, which is not checked here.
    """
    draws = _draws(completion, responses=responses, seed=seed, step=step, ranks=ranks)
    within = draws.inside & (draws.uniform < fraction * draws.num_groups / max(1, draws.num_drawn))
    num_valid = _nonzero(ranks.sums(valid.double().sum()))
    return (within & valid & ~kept).double() / (fraction * num_valid)


def drawn_completions(
    completion: Int[Tensor, " N"],
    *,
    responses: float,
    seed: int,
    step: int,
    ranks: Ranks = ALONE,
) -> Bool[Tensor, " N"]:
    """The tokens of the completions in which `anchor_weights` draws, from the same arguments."""
    return _draws(completion, responses=responses, seed=seed, step=step, ranks=ranks).inside


class _Draws(NamedTuple):
    """What is random about the tokens that are held."""

    uniform: Float[Tensor, " N"]
    inside: Bool[Tensor, " N"]
    """Tokens of the drawn completions."""
    num_groups: int
    """Completions, and the drawn ones among them, of all ranks."""
    num_drawn: int


def _draws(
    completion: Int[Tensor, " N"], *, responses: float, seed: int, step: int, ranks: Ranks
) -> _Draws:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
    device, count = completion.device, completion.shape[0]
    uniform = uniform_part(count, generator, ranks, torch.float32).to(device)
    groups, group = completion.unique(return_inverse=True)
    counts = ranks.counts(len(groups))
    num_groups, first = sum(counts), sum(counts[: ranks.rank])
    num_drawn = math.ceil(responses * num_groups)
    inside = torch.ones(count, dtype=torch.bool, device=device)
    if num_drawn < num_groups:
        order = torch.randperm(num_groups, generator=generator).to(device)
        inside = order[first + group] < num_drawn
    return _Draws(uniform, inside, num_groups, num_drawn)


def held_share(
    reach: Float[Tensor, " N"],
    foreign: Float[Tensor, " N"] | float = 0.0,
    *,
    start: Float[Tensor, " N"] | float = 1.0,
) -> Float[Tensor, " N"]:
    """The share g of a token that the hold of `method: reach` leaves at the initial student, in [0, 1]:

        g_i = lambda (1 - r_i - f_i)

    what is out of reach for the time being, foreign ends aside. A drawn token of weight w is held to the
    student's start by w g, and to the teacher by w (1 - g). The first is later multiplied by `anchor_coef`.
    Source: ours, docs/results/reach_forms.md.

    Args:
        reach: r in [0, 1], of `trainer.reach_sums.judged_reach`; foreign: f, with r + f <= 1.
        start: lambda: `start_share`, or more in `trainer.reach_sums.start_shares`.
    """
    # In this order it is exactly 0 where r is 1 - f.
    return start * (1.0 - (reach + foreign)).clamp_min(0.0)


def start_share(step: int, num_steps: int) -> float:
    """lambda of `held_share`: from 1 to 0 over the first half of a run, and over no less than 100 steps; 1
    where its length is not known.

    Let go faster, a student is lost before it has learned what follows the teacher's words. Source: ours,
    docs/results/reach_forms.md.

    Args:
        step: steps taken before, from 0.
    """
    if num_steps <= 0:
        return 1.0
    return max(0.0, 1.0 - step / max(LEAST_RELEASE, num_steps / 2))


def _nonzero(count: Tensor) -> Tensor:
    """Counts that divide: 1 in place of 0, so that an empty selection gives zeros and not NaN."""
    return torch.where(count == 0, torch.ones_like(count), count)
