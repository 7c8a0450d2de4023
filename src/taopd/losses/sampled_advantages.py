"""Advantages of the sampled token that are not A = log p_T(y) - log p_S(y) itself.

They change what a token's update weighs, and read the teacher at the sampled token alone. Their expectation
is no gradient of the reverse KL.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy_direction(
    student_logprobs: Float[Tensor, "N V"], token_ids: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """D_y, nats: the change of the student's entropy H by a small step along the gradient of log p_S(y).

        D_y = sum_v p(v)^2 (log p(v) + H) - p(y) (log p(y) + H)

    The step is one of the logits z, e_y - p, and dH/dz_v = -p(v) (log p(v) + H); without gradient. Source:
    the first-order influence of arXiv 2608.29846, written out.
    """
    logp = student_logprobs.detach()
    p = logp.exp()
    # 0 log 0 is 0.
    own = torch.where(p > 0, p * logp, 0.0)
    weighted = own - p * own.sum(-1, keepdim=True)  # p(v) (log p(v) + H)
    return (p * weighted).sum(-1) - weighted.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def influence_directed(
    advantage: Float[Tensor, " N"], direction: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """A as it is where A D_y >= 0: the update widens the student's distribution. Where it narrows it, w A:

        w = |p_T(y) - p_S(y)| / (p_T(y) + p_S(y)) = |tanh(A / 2)|

    Source: IDA-OPD, arXiv 2608.29846.
    """
    shrunk = (advantage / 2.0).tanh().abs() * advantage
    return torch.where(advantage * direction < 0, shrunk, advantage)


def sampled_tv(advantage: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """max(0, 1 - exp(A)), in [0, 1]: its mean over y from the student is the total variation distance.

    The gradient of that distance has the advantage sign(A). Source: TV-OPD, arXiv 2609.08341, without the
    factor that all tokens of a step share: Adam divides by it.
    """
    return -torch.expm1(advantage.clamp_max(0.0))
