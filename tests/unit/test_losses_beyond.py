"""Routed and teacher-free losses, and losses on merged ids, against their definitions."""

import math

import pytest
import torch

from taopd.kernels import Head
from taopd.losses import (
    Targets,
    entropy_direction,
    needs_own_samples,
    needs_teacher_distribution,
    resolve_loss,
    routed_kl,
    sampled_tail_kl,
)

DOUBLE = torch.float64


def rows(num, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num, vocab, generator=generator, dtype=DOUBLE)).log_softmax(-1)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_route_is_decided_by_the_mass_that_the_student_reaches(k):
    student, teacher = rows(60, 12, 0), rows(60, 12, 1)
    found = routed_kl(student, teacher, k=k)
    routes = set()
    for row in range(60):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        reached = sum(q[v] for v in sorted(range(12), key=lambda v: -p[v])[:k])
        routes.add(reached >= 0.5)
        expected = kl(p, q) if reached >= 0.5 else kl(q, p)
        assert found[row].item() == pytest.approx(expected)
    assert routes == ({True, False} if k < 12 else {True})


def test_a_token_out_of_reach_has_a_gradient_only_by_the_forward_route():
    logits = torch.tensor([[5.0, 4.0, -30.0]], dtype=DOUBLE, requires_grad=True)
    teacher = torch.tensor([[0.01, 0.01, 0.98]], dtype=DOUBLE).log()
    routed_kl(logits.log_softmax(-1), teacher, k=2).sum().backward()
    assert logits.grad[0, 2].item() == pytest.approx(-0.98, abs=1e-6)  # p - q


def test_the_fixed_advantage_lowers_the_tokens_it_is_given_and_reads_no_teacher():
    assert not needs_teacher_distribution("fixed_advantage")
    logits = rows(4, 6, 2).requires_grad_()
    ids = torch.tensor([0, 3, 5, 5])
    loss = resolve_loss("fixed_advantage")(logits.log_softmax(-1), Targets(token_ids=ids))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = torch.nn.functional.one_hot(ids, 6) - logits.exp()
    torch.testing.assert_close(gradient, expected.detach())


def entropy(logits):
    p = logits.softmax(-1).tolist()
    return -sum(each * math.log(each) for each in p)


def test_the_entropy_direction_is_the_slope_of_the_entropy_along_the_update():
    """By finite differences: a step along the gradient of log p(y) by the logits."""
    student, step = rows(12, 6, 0), 1e-5
    ids = torch.arange(12) % 6
    found = entropy_direction(student, ids)
    for row in range(12):
        update = torch.nn.functional.one_hot(ids[row], 6) - student[row].exp()
        slope = entropy(student[row] + step * update) - entropy(student[row] - step * update)
        assert found[row].item() == pytest.approx(slope / (2 * step), abs=1e-8)
    assert found.min() < 0 < found.max(), "vacuous"


def test_a_certain_student_has_no_entropy_to_move():
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert entropy_direction(certain, torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("merged", [(), (1, 4)])
@pytest.mark.parametrize("stale", [False, True])
def test_an_update_that_narrows_is_shrunk_by_how_far_the_two_agree(merged, stale):
    """IDA-OPD: the gradient by the logits, against p and q of the sampled class."""
    student, ids = rows(60, 6, 0), torch.arange(60) % 6
    q = rows(60, 6, 3).exp().gather(1, ids[:, None]).squeeze(1)
    before = None
    targets = Targets(token_ids=ids, teacher_logprobs=q.log())
    if stale:
        before = student.gather(1, ids[:, None]).squeeze(1) + 0.05
        targets = Targets(token_ids=ids, teacher_logprobs=q.log(), sampling_logprobs=before)
    logits = student.clone().requires_grad_()
    function = resolve_loss("sampled_ida", merged_ids=merged)
    function(logits.log_softmax(-1), targets).sum().backward()
    narrowed = 0
    for row, y in enumerate(ids.tolist()):
        members = list(merged) if y in merged else [y]
        classes = [[v] for v in range(6) if v not in merged] + ([list(merged)] if merged else [])
        masses = [sum(student[row, v].exp().item() for v in each) for each in classes]
        at = classes.index(members)
        p = masses[at] if before is None else math.exp(before[row].item())
        ratio = masses[at] / p
        gap = math.log(q[row].item() / p)
        h = -sum(m * math.log(m) for m in masses)
        direction = sum(m * m * (math.log(m) + h) for m in masses)
        direction -= masses[at] * (math.log(masses[at]) + h)
        if gap * direction < 0:
            narrowed += 1
            gap *= abs(q[row].item() - p) / (q[row].item() + p)
        # The clip of the ratio is not in reach here, but for merged classes.
        if (gap > 0 and ratio > 1.28) or (gap < 0 and ratio < 0.8):
            gap = 0.0
        for v in range(6):
            share = student[row, v].exp().item()
            slope = share / masses[at] * (v in members) - share
            assert logits.grad[row, v].item() == pytest.approx(-ratio * gap * slope, abs=1e-9)
    assert 8 < narrowed < 52, "vacuous"


def test_the_sampled_distance_is_right_in_expectation_in_value_and_gradient():
    """TV-OPD: over every token that could have been sampled."""
    student, teacher = rows(1, 8, 7), rows(1, 8, 8)
    p, q = student[0].exp(), teacher[0].exp()
    function, values, gradients = resolve_loss("sampled_tv"), [], []
    for y in range(8):
        logits = student.clone().requires_grad_()
        targets = Targets(token_ids=torch.tensor([y]), teacher_logprobs=teacher[:, y])
        value = function(logits.log_softmax(-1), targets)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0][0])
    assert all(0.0 <= value <= 1.0 for value in values)
    distance = (p - q).abs().sum().item() / 2
    assert (p * torch.tensor(values, dtype=DOUBLE)).sum().item() == pytest.approx(distance)
    logits = student.clone().requires_grad_()
    exact = (logits.softmax(-1) - q).abs().sum()
    (expected,) = torch.autograd.grad(exact, logits)
    # d TV = sum of sign(p - q) dp / 2, and twice that is the mean of sign(A) times the score.
    torch.testing.assert_close((p.unsqueeze(1) * torch.stack(gradients)).sum(0), expected[0])


@pytest.mark.parametrize(
    "loss", ["reverse_kl", "forward_kl", "jsd", "topk_reverse_kl", "routed_kl", "sampled_tail_kl"]
)
def test_merged_ids_are_one_token(loss):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 4, generator=generator, dtype=DOUBLE)
    head = Head(weight=torch.randn(9, 4, generator=generator, dtype=DOUBLE))
    student = rows(5, 9, 4)
    targets = Targets(token_ids=torch.arange(5), teacher_hidden=hidden, teacher_head=head)
    of_the_class = torch.tensor([0, 6, 1, 2, 6])  # Ids 1 and 4 are in it; ids above them move down.
    merged = resolve_loss(loss, k=3, merged_ids=(1, 4, 8))(student, targets)

    def small(probs):
        others = [v for v in range(9) if v not in (1, 4, 8)]
        return torch.cat([probs[:, others], probs[:, [1, 4, 8]].sum(1, keepdim=True)], 1).log()

    teacher = (hidden @ head.weight.T).softmax(-1)
    identity = Targets(
        token_ids=of_the_class,
        teacher_hidden=small(teacher),
        teacher_head=Head(weight=torch.eye(7, dtype=DOUBLE)),
    )
    expected = resolve_loss(loss, k=3)(small(student.exp()), identity)
    torch.testing.assert_close(merged, expected)


def test_a_sampled_stop_is_the_whole_class():
    student, teacher = rows(3, 6, 5), rows(3, 6, 6)
    ids, merged = torch.tensor([1, 2, 4]), (1, 4)
    teacher_logprobs = torch.tensor(
        [
            math.log(sum(teacher[row, v].exp().item() for v in (merged if i in merged else (i,))))
            for row, i in enumerate(ids.tolist())
        ],
        dtype=DOUBLE,
    )
    targets = Targets(token_ids=ids, teacher_logprobs=teacher_logprobs)
    found = resolve_loss("sampled_reverse_kl", merged_ids=merged)(student, targets)
    for row, i in enumerate(ids.tolist()):
        mass = sum(student[row, v].exp().item() for v in (merged if i in merged else (i,)))
        expected = math.log(mass) - teacher_logprobs[row].item()
        assert found[row].item() == pytest.approx(expected)


def every_outcome(student, teacher, k, sampling=None):
    """Value and gradient of the estimate for every token y that could have been sampled; one position."""
    values, gradients = [], []
    for y in range(student.shape[1]):
        logits = student.clone().requires_grad_()
        value = sampled_tail_kl(
            logits.log_softmax(-1),
            teacher,
            torch.tensor([y]),
            k=k,
            sampling_logprobs=None if sampling is None else sampling[:, y],
        )
        values.append(value.item())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0][0])
    return torch.tensor(values, dtype=DOUBLE), torch.stack(gradients)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("stale", [False, True])
def test_a_sampled_tail_is_right_in_expectation_in_value_and_gradient(k, stale):
    student, teacher = rows(1, 8, 7), rows(1, 8, 8)
    sampling = rows(1, 8, 9) if stale else None
    drawn = (student if sampling is None else sampling)[0].exp()
    values, gradients = every_outcome(student, teacher, k, sampling)
    p, q = student[0].exp().tolist(), teacher[0].exp().tolist()
    assert (drawn * values).sum().item() == pytest.approx(kl(p, q))
    logits = student.clone().requires_grad_()
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - teacher)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close((drawn.unsqueeze(1) * gradients).sum(0), expected[0])
    if not stale:
        # What is summed does not vary: only tokens of the tail leave the mean.
        outside = sorted(range(8), key=lambda v: -p[v])[k:]
        inside = [v for v in range(8) if v not in outside]
        assert values[inside].max() - values[inside].min() < 1e-12
        listed = sum(p[v] * math.log(p[v] / q[v]) for v in inside)
        for v in outside:
            assert values[v].item() == pytest.approx(listed + math.log(p[v] / q[v]))


def test_a_sampled_tail_needs_the_students_own_samples_and_the_whole_teacher():
    assert needs_own_samples("sampled_tail_kl") and needs_teacher_distribution("sampled_tail_kl")
    assert not needs_own_samples("topk_reverse_kl") and needs_own_samples("sampled_reverse_kl")
