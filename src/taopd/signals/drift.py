"""Idle drift: how far a student has moved from its start without coming nearer to the teacher.

    idle_i = KL(p_S || p_R)   where  overlap(p_T, p_S) - overlap(p_T, p_R) < NEARER,  else 0       [nats]
    overlap(p, q) = sum_v min(p(v), q(v)), over the teacher's top-K

with the student S now, the student R before training, and the teacher T. A student that learns moves towards
the teacher; one that is pushed by updates meant for other tokens moves elsewhere, and this comes before its
answers suffer.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEARER = 0.05
"""Probability mass: a gain in overlap from which on a move counts as one towards the teacher."""


def idle_drift(
    student_logprobs: Float[Tensor, "N K"],
    reference_logprobs: Float[Tensor, "N K"],
    teacher_logprobs: Float[Tensor, "N J"],
    student_at_teacher: Float[Tensor, "N J"],
    reference_at_teacher: Float[Tensor, "N J"],
) -> Float[Tensor, " N"]:
    """Idle drift of N positions, in nats; the KL with what lies outside the student's top-K as one token.

    Args:
        student_logprobs: at the student's own top-K; -inf where a list is shorter.
        reference_logprobs: the initial student's, at the same ids.
        teacher_logprobs: at the teacher's own top-K.
        student_at_teacher: the student's at the teacher's top-K; likewise `reference_at_teacher`.
    """
    teacher = teacher_logprobs.exp()
    now = torch.minimum(teacher, student_at_teacher.exp()).sum(-1)
    before = torch.minimum(teacher, reference_at_teacher.exp()).sum(-1)
    drift = _kl_with_tail(student_logprobs.float(), reference_logprobs.float())
    return torch.where(now - before < NEARER, drift, 0.0)


def _kl_with_tail(p: Float[Tensor, "N K"], q: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    listed = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    p_tail, q_tail = (1.0 - logs.exp().sum(-1) for logs in (p, q))
    tail = p_tail.clamp_min(1e-12) * (p_tail.clamp_min(1e-12) / q_tail.clamp_min(1e-12)).log()
    return (listed + tail).clamp_min(0.0)


def ids_to_compare(
    student_ids: Int[Tensor, "N K"], teacher_ids: Int[Tensor, "N J"]
) -> Int[Tensor, "N W"]:
    """The ids at which the reference is asked: the student's, then the teacher's; 0 for a gap in a list."""
    return torch.cat([student_ids, teacher_ids], dim=1).clamp_min(0)


def at_ids(
    ids: Int[Tensor, "N K"], logprobs: Float[Tensor, "N K"], wanted: Int[Tensor, "N W"]
) -> Float[Tensor, "N W"]:
    """A list's log-probs at other ids; -inf for an id that it does not hold."""
    same = (wanted.unsqueeze(2) == ids.unsqueeze(1)) & (wanted >= 0).unsqueeze(2)
    found = torch.where(same, logprobs.unsqueeze(1), -torch.inf)
    return found.amax(-1)
