"""The reverse KL in two parts: exact on the student's top-K, one sample for all other tokens.

Why: a sum over K ids alone is biased, and lets the student hide mass in the tail for free; a tail bucket is a
lower bound. Here the token that the student sampled stands for the tail whenever it lies there.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sampled_tail_kl(
    student_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    token_ids: Int[Tensor, " N"],
    *,
    k: int,
    sampling_logprobs: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Estimate of KL(student || teacher) without bias, and likewise its gradient; nats, may be negative.

        g(v)  = log p_S(v) - log p_T(v), detached
        value = sum over S of p_S(v) g(v)  +  [y not in S] r g(y),   r = p_S(y) / p_sampling(y)

    S is the student's present top-K, y the sampled token. The expectation over y is the KL, and that of the
    gradient is sum_v grad p_S(v) g(v), its gradient. With k >= V it is `reverse_kl` (up to a gradient of
    zero); with k = 0 it would be the policy gradient of `sampled_reverse_kl`. The variance is that of the
    tail alone. Only for tokens that the student sampled, at the temperature of its log-probs.

    Args:
        sampling_logprobs: of y under the policy that sampled it; None: the student itself, r = 1.

    Source: ours; the decomposition of a sum into a part that is summed and a part that is sampled.
    """
    k = min(k, student_logprobs.shape[-1])
    gap = (student_logprobs - teacher_logprobs).detach()
    ids = student_logprobs.detach().topk(k, dim=-1).indices
    listed = (student_logprobs.gather(1, ids).exp() * gap.gather(1, ids)).sum(-1)
    sampled = token_ids.unsqueeze(1)
    own = student_logprobs.gather(1, sampled).squeeze(1)
    ratio = (own - (own.detach() if sampling_logprobs is None else sampling_logprobs)).exp()
    outside = ~(ids == sampled).any(1)
    return listed + torch.where(outside, ratio * gap.gather(1, sampled).squeeze(1), 0.0)
