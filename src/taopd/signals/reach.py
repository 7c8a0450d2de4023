"""Reach: how much of the teacher's mass lies on tokens that the initial student could have said.

    r_i = sum_v p_T(v) s(p_S0(v)),   s(p) = p / (p + threshold)                          in [0, 1]

S0 is the student before training, T the teacher, both over the whole vocabulary, at the student's own
contexts. s is one half at the threshold, 0.01 at a hundredth of it and 0.99 at a hundred times it. C asks the
same of the present student, and by rank: under a flat student many ids beyond the K best are as likely as
they are, and under a sharp one the K-th is hardly ever said.

p_S0 is that at temperature 1, whatever the temperature of sampling: what a student could have said lies in
its weights. At 0.7 a probability of 4e-6 would be 2e-8, too far away to be selected, and be taught by the
hold alone once the start is let go: the student is lost then (docs/results/settings.md).

Why smooth: a teacher's words may have any probability under the student, with no gap for a threshold to lie
in. What is further away is taught later, and held the more at the start, but it is not given up.

Foreign ends are out of reach whatever their probability: ids that end the teacher's texts, at which the
student's sampler goes on. Such a token does for the student nothing of what it does for the teacher.

Exact where both distributions are here. From a server's answer it is the lower bound over the ids that the
answer holds: the true r is larger by at most the mass that the answer does not account for.

Source: ours. The form was found on the labs that docs/results/default.md shows; what else was tried is in
docs/results/reach_forms.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.kernels import Head, chunk_elements_on, positions_per_chunk, probabilities_at
from taopd.signals.merge_stops import sampled_logprobs
from taopd.signals.types import TokenSignals

THRESHOLD = 1e-4
"""Probability under the initial student at which a token counts half."""


def sayable(initial_logprobs: Tensor, threshold: float) -> Tensor:
    """Share s of a token's teacher mass that counts as within reach; 1 everywhere at a threshold of 0.

    The one place where a probability of the initial student becomes reach.
    """
    if threshold == 0.0:
        return torch.ones_like(initial_logprobs)
    # In place: the tensor has the size of the vocabulary at every position.
    return (initial_logprobs - math.log(threshold)).sigmoid_()


def reach_from_logprobs(
    initial_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    threshold: float = THRESHOLD,
    stop_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> Float[Tensor, " N"]:
    """r of N positions from two full rows of log-probs, nats in, a share of mass out.

    Args:
        stop_ids: ids that count as one token in both models.
        foreign_ends: ids that are out of reach whatever the student's probability.

    Example:
        >>> initial, teacher = (torch.tensor([row]).log() for row in ([0.9, 0.1], [0.2, 0.8]))
        >>> reach_from_logprobs(initial, teacher, threshold=0.5)
        tensor([0.2619])
    """
    counted = counts(initial_logprobs, threshold, stop_ids, foreign_ends)
    # From what is out of reach: where all is within, r is 1 and not a rounded sum of a whole vocabulary.
    beyond = (teacher_logprobs.exp() * (1.0 - counted)).sum(1)
    return (1.0 - beyond).clamp(0.0, 1.0)


def counts(
    initial_logprobs: Float[Tensor, "N V"],
    threshold: float,
    stop_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> Float[Tensor, "N V"]:
    """s of every token: `sayable`, merged ids as one token, and 0 at foreign ends."""
    counted = sayable(initial_logprobs, threshold)
    if stop_ids:
        ids = torch.tensor(list(stop_ids), device=initial_logprobs.device)
        whole = initial_logprobs[:, ids].logsumexp(1, keepdim=True)
        counted[:, ids] = sayable(whole, threshold).expand(-1, len(ids))
    # A teacher may end with an id that the student does not have.
    counted[:, [index for index in foreign_ends if index < counted.shape[1]]] = 0.0
    return counted


def at_temperature_1(logprobs: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Log-probs of full rows whose logits another temperature divided."""
    return logprobs if temperature == 1.0 else (temperature * logprobs).log_softmax(-1)


@torch.no_grad()
def reach_from_states(
    initial: tuple[Float[Tensor, "N D"], Head],
    teacher: tuple[Float[Tensor, "N Dt"], Head],
    token_ids: Int[Tensor, " N"],
    *,
    threshold: float,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    foreign_ends: Sequence[int] = (),
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """r, and log p_S0 of the sampled tokens, from the states and heads of both models; float32, in bounded
    memory.

    Args:
        temperature: of sampling. It divides the teacher's logits, and the initial student's for the sampled
            tokens; r takes the initial student's probabilities at temperature 1.
    """
    (hidden, head), (teacher_hidden, teacher_head) = initial, teacher
    # One copy of each head in the states' dtype, and not one per chunk.
    head, teacher_head = head.cast(hidden.dtype), teacher_head.cast(teacher_hidden.dtype)
    reaches, sampled = [], []
    for rows in chunks(hidden, head):
        logprobs = head.logprobs(hidden[rows], temperature)
        sampled.append(sampled_logprobs(logprobs, token_ids[rows], merged_ids=stop_ids))
        # Under the same name: those of another temperature are freed before the teacher's are made.
        logprobs = at_temperature_1(logprobs, temperature)
        reaches.append(
            reach_from_logprobs(
                logprobs,
                teacher_head.logprobs(teacher_hidden[rows], temperature),
                threshold=threshold,
                stop_ids=stop_ids,
                foreign_ends=foreign_ends,
            )
        )
    return torch.cat(reaches), torch.cat(sampled)


def reach_by_teacher(
    initial: tuple[Float[Tensor, "N D"], Head],
    teachers: Sequence[tuple[Int[Tensor, " _"] | slice, Float[Tensor, "_ _"], Head]],
    token_ids: Int[Tensor, " N"],
    **rule: Any,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`reach_from_states` of N tokens, each with its own teacher.

    Args:
        teachers: the tokens of each, its states there, and its head.
        rule: keyword arguments of `reach_from_states`.
    """
    states, head = initial
    reach, sampled = torch.zeros(2, len(token_ids), device=states.device)
    for index, hidden, teacher_head in teachers:
        reach[index], sampled[index] = reach_from_states(
            (states[index], head), (hidden, teacher_head), token_ids[index], **rule
        )
    return reach, sampled


def chunks(hidden: Float[Tensor, "N D"], head: Head) -> list[slice]:
    """The rows whose logits are in memory at a time; one part at least."""
    size = positions_per_chunk(head.vocab_size, chunk_elements_on(hidden.device.type))
    return [slice(start, start + size) for start in range(0, max(1, hidden.shape[0]), size)]


def foreign_mass(
    teacher_hidden: Float[Tensor, "N Dt"],
    teacher_head: Head,
    foreign_ends: Sequence[int],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """f of N positions: the teacher's mass on foreign ends; float32."""
    # A teacher may lack an end that the settings give.
    ids = [index for index in foreign_ends if index < teacher_head.vocab_size]
    return probabilities_at(teacher_hidden, teacher_head, ids, temperature=temperature).sum(1)


def foreign_bound(signals: TokenSignals, foreign_ends: Sequence[int]) -> Float[Tensor, " N"]:
    """Lower bound of f, over the teacher's list."""
    ends = signals.teacher_topk_ids.new_tensor(list(foreign_ends))
    listed = torch.isin(signals.teacher_topk_ids, ends)
    return torch.where(listed, signals.teacher_topk_logprobs.exp(), 0.0).sum(1)


def reach_bound(
    signals: TokenSignals,
    at_students: Float[Tensor, "N K"],
    at_teachers: Float[Tensor, "N K"],
    *,
    threshold: float,
    foreign_ends: Sequence[int] = (),
) -> Float[Tensor, " N"]:
    """Lower bound of r from the ids at which a teacher elsewhere gave its log-probs.

        sum of p_T(v) s(p_S0(v)) over the teacher's list, and over the student's if it was scored

    Args:
        at_students: the initial student's log-probs at `student_topk_ids`; likewise at the teacher's. A
            server scores at temperature 1.
    """
    ends = signals.teacher_topk_ids.new_tensor(list(foreign_ends))

    def known_mass(ids: Tensor, teacher: Tensor, initial: Tensor, counts: Tensor) -> Tensor:
        counts = counts & (ids >= 0) & ~torch.isin(ids, ends)
        return torch.where(counts, teacher.exp() * sayable(initial, threshold), 0.0).sum(1)

    students, teachers = signals.student_topk_ids, signals.teacher_topk_ids
    total = known_mass(
        teachers, signals.teacher_topk_logprobs, at_teachers, torch.ones_like(teachers).bool()
    )
    if (known := signals.teacher_at_student_ids) is not None:
        # Once: an id in both lists was counted with the teacher's.
        alone = ~(students.unsqueeze(2) == teachers.unsqueeze(1)).any(2)
        total = total + known_mass(students, known, at_students, alone)
    return total.clamp(0.0, 1.0)
