"""One side's top-K lists as mappings from id to probability, and what two of them say together.

What: the steps of `taopd.signals.topk_lists`, rules R1, R3, R4 and R6 of docs/released-code.md. A repeated id
keeps its first place in the list and its last value.

Layout: tensors are [K, N], so that every step over a list runs along N in memory; loops are over K,
never over positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from taopd.signals.arithmetic import Arithmetic

PROBABILITY_FLOOR = 1e-12
"""Smallest renormalized probability in the union geometry. [R3]"""


@dataclass(frozen=True, slots=True)
class Support:
    """One side's lists as mappings, [K, N]."""

    ids: Tensor
    member: Tensor
    """First entry of each id."""
    probs: Tensor
    """Value of the mapping at members, 0 elsewhere."""
    order: Tensor | None
    """How R1 moved the columns, None where it moved none."""
    lists: tuple[Tensor, Tensor]
    """(ids, log-probs) [N, K] after R1; the given tensors themselves where it changed nothing."""

    def keys(self, absent: int) -> Tensor:
        """Ids as float64, `absent` where there is no member: compared three times as fast as int64,
        and exact below 2**53."""
        keys = self.ids.double()
        return keys if bool(self.member.all()) else keys.masked_fill_(~self.member, absent)


def sum_in_order(columns: Tensor) -> Tensor:
    """Sum over the first axis from first to last, as a plain loop would."""
    total = torch.zeros_like(columns[0])
    for column in columns:
        total += column
    return total


def finite(values: Tensor) -> Tensor:
    """`values.isfinite()`, in two passes over memory rather than four."""
    return values.abs() < torch.inf


def read_support(ids_NK: Tensor, logprobs_NK: Tensor, arithmetic: Arithmetic) -> Support:
    """R1: drop what is not finite, close the gaps, and read the list as a mapping."""
    ids = ids_NK.T.contiguous()
    logprobs = logprobs_NK.T.double().contiguous()
    real = finite(logprobs) & (ids >= 0)
    order, lists = None, (ids_NK, logprobs_NK.double())
    if not bool(real.all()):
        if bool((real[1:] & ~real[:-1]).any()):
            order = (~real).to(torch.int8).argsort(dim=0, stable=True)
            ids, logprobs, real = (x.gather(0, order) for x in (ids, logprobs, real))
        ids = ids.masked_fill(~real, -1)
        logprobs = logprobs.masked_fill(~real, -torch.inf)
        lists = (ids.T.contiguous(), logprobs.T.contiguous())
    probs, member = arithmetic.exp(logprobs), real
    num_columns = ids.shape[0]
    repeated = torch.zeros_like(real)
    for shift in range(1, num_columns):
        repeated[shift:] |= ids[shift:] == ids[:-shift]
    repeated &= real
    if bool(repeated.any()):
        values = probs.clone()
        for column in range(num_columns):  # a later entry overwrites an earlier one
            values = torch.where(ids == ids[column], probs[column], values)
        member = real & ~repeated
        probs = values.masked_fill(~member, 0.0)
    return Support(ids, member, probs, order, lists)


def list_entropy(support: Support, mass: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """R4: entropy of the renormalized list, in nats and divided by ln(max(n, 2))."""
    share = support.probs / mass
    positive = support.probs > 0
    # 0 ln 0 = 0: the smallest normal number stands in for 0 inside the logarithm
    nats = -sum_in_order(share * arithmetic.log(share.clamp(min=torch.finfo(torch.float64).tiny)))
    num_positive = positive.sum(0)
    nats = torch.where(num_positive > 1, nats, torch.zeros_like(nats))
    # one logarithm per possible n, shared by all positions
    logs = torch.tensor(
        [math.log(max(n, 2)) for n in range(support.ids.shape[0] + 1)],
        dtype=torch.float64,
        device=nats.device,
    )
    return nats, nats / logs[num_positive]


def union_geometry(
    student: Support,
    teacher: Support,
    at_student: Tensor,
    teacher_only: Tensor,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """R3: (D, reverse D, Bhattacharyya); 0 where the union is empty or a mass is not positive."""
    member = torch.cat([student.member, teacher_only])
    p = torch.cat([student.probs, torch.zeros_like(student.probs)])
    q = torch.cat([at_student, teacher.probs * teacher_only])
    if arithmetic.union_order is not None:
        order = arithmetic.union_order(torch.cat([student.ids, teacher.ids]), member)
        member, p, q = (x.gather(0, order) for x in (member, p, q))
    p_mass, q_mass = sum_in_order(p), sum_in_order(q)
    defined = (p_mass > 0) & (q_mass > 0)
    p.div_(p_mass).clamp_(min=PROBABILITY_FLOOR)
    q.div_(q_mass).clamp_(min=PROBABILITY_FLOOR)
    log_ratio = arithmetic.log(q).sub_(arithmetic.log(p))  # 0 off the union: both are the floor
    forward = sum_in_order(q * log_ratio)
    reverse = -sum_in_order(log_ratio.mul_(p))
    bhattacharyya = sum_in_order(arithmetic.sqrt(p.mul_(q)).mul_(member))
    forward, reverse, bhattacharyya = (
        value.masked_fill(~defined, 0.0) for value in (forward, reverse, bhattacharyya)
    )
    return forward, reverse, bhattacharyya


def target_rank(support: Support, target_ids: Tensor) -> Tensor:
    """R6: 1-based place of the target, 0 where it is not in the list."""
    num_columns = support.ids.shape[0]
    places = torch.arange(1, num_columns + 1, device=target_ids.device)[:, None]
    hits = (support.ids == target_ids) & support.member
    return torch.where(hits, places, 0).sum(0)
