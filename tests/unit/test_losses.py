"""Divergences against their definitions; gradients against autograd; reduction against counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.kernels import Head
from taopd.losses import (
    LOSSES,
    Targets,
    anchor_weights,
    forward_kl,
    head_loss,
    jsd,
    policy_gradient,
    reduction_weights,
    resolve_loss,
    reverse_kl,
    topk_reverse_kl,
)

DOUBLE = torch.float64


def rows(num: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num, vocab, generator=generator, dtype=DOUBLE)).log_softmax(-1)


def kl_by_definition(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_divergences_match_their_definitions(seed, vocab):
    student, teacher = rows(3, vocab, seed), rows(3, vocab, seed + 1)
    for row in range(3):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        mixture = [0.7 * a + 0.3 * b for a, b in zip(p, q, strict=True)]
        expected = 0.3 * kl_by_definition(q, mixture) + 0.7 * kl_by_definition(p, mixture)
        assert reverse_kl(student, teacher)[row].item() == pytest.approx(kl_by_definition(p, q))
        assert forward_kl(student, teacher)[row].item() == pytest.approx(kl_by_definition(q, p))
        assert jsd(student, teacher, beta=0.3)[row].item() == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 40), st.data())
def test_divergence_laws(seed, vocab, data):
    student, teacher = rows(4, vocab, seed), rows(4, vocab, seed + 1)
    k = data.draw(st.integers(1, vocab))
    for divergence in (reverse_kl, forward_kl, jsd, lambda s, t: topk_reverse_kl(s, t, k=k)):
        assert (divergence(student, teacher) >= -1e-12).all()
        assert divergence(student, student).abs().max() < 1e-12
    # Merging classes into a bucket loses information: a bound, tight with a bucket of one.
    assert (topk_reverse_kl(student, teacher, k=k) <= reverse_kl(student, teacher) + 1e-12).all()
    if k >= vocab - 1:
        torch.testing.assert_close(
            topk_reverse_kl(student, teacher, k=k), reverse_kl(student, teacher)
        )


def test_topk_reverse_kl_by_hand():
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=DOUBLE).log()
    teacher = torch.tensor([[0.25, 0.25, 0.1, 0.4]], dtype=DOUBLE).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert topk_reverse_kl(student, teacher, k=1).item() == pytest.approx(expected)


def problem(loss: str, seed: int = 0):
    """Hidden states, heads and targets of four positions, float64, with bias, scale and soft cap."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    hidden, weight, bias = normal(4, 5), normal(11, 5), normal(11)
    teacher = Head(weight=normal(11, 7))
    teacher_hidden, weights = normal(4, 7), normal(4).abs()
    ids = torch.randint(11, (4,), generator=generator)
    logprobs = teacher.logprobs(teacher_hidden, 1.3)
    targets = Targets(
        token_ids=ids,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher,
        teacher_logprobs=logprobs.gather(1, ids[:, None])[:, 0],
        temperature=1.3,
    )
    return hidden, weight, bias, weights, targets, resolve_loss(loss, beta=0.4, k=3)


@pytest.mark.parametrize("loss", LOSSES)
def test_head_loss_equals_plain_autograd_and_passes_gradcheck(loss):
    hidden, weight, bias, weights, targets, function = problem(loss)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def chunked(hidden, weight, bias):
        head = Head(weight=weight, bias=bias, scale=0.7, softcap=3.0)
        return head_loss(hidden, head, weights, targets, function, chunk_elements=22)[0]

    def plain(hidden, weight, bias):
        logits = 3.0 * torch.tanh((hidden @ weight.T + bias) * 0.7 / 3.0) / 1.3
        return (function(logits.log_softmax(-1), targets) * weights).sum()

    torch.testing.assert_close(chunked(*inputs), plain(*inputs))
    for got, expected in zip(
        torch.autograd.grad(3.0 * chunked(*inputs), inputs),
        torch.autograd.grad(3.0 * plain(*inputs), inputs),
        strict=True,
    ):
        assert expected.norm() > 0, "vacuous"
        torch.testing.assert_close(got, expected)
    if loss not in (
        "sampled_ida",
        "sampled_reverse_kl",
        "sampled_tail_kl",
        "sampled_tv",
        "fixed_advantage",
    ):  # Their advantage is detached: not the gradient of its value.
        assert torch.autograd.gradcheck(chunked, inputs)


def test_head_loss_without_a_position_is_zero_with_a_graph():
    _, weight, _, _, targets, function = problem("reverse_kl")
    hidden = torch.zeros(0, 5, dtype=DOUBLE, requires_grad=True)
    weight.requires_grad_()
    empty = targets[slice(0, 0)]
    loss, per_token = head_loss(
        hidden, Head(weight=weight), torch.zeros(0, dtype=DOUBLE), empty, function
    )
    loss.backward()
    assert loss.item() == 0 and len(per_token) == 0
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_half_precision_head_gradient_is_accumulated_in_float32():
    """Many small chunks in bfloat16 against the float64 truth: the error is one rounding, not many."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 8, generator=generator, dtype=DOUBLE).bfloat16()
    weight = torch.randn(16, 8, generator=generator, dtype=DOUBLE).bfloat16()
    teacher_hidden = torch.randn(512, 8, generator=generator, dtype=DOUBLE).bfloat16()
    teacher = Head(weight=torch.randn(16, 8, generator=generator, dtype=DOUBLE).bfloat16())
    gradients = []
    for dtype in (DOUBLE, torch.bfloat16):
        leaf = weight.to(dtype).requires_grad_()
        targets = Targets(
            token_ids=torch.zeros(512, dtype=torch.long),
            teacher_hidden=teacher_hidden.to(dtype),
            teacher_head=teacher.cast(dtype),
        )
        weights = torch.full((512,), 1 / 512, dtype=torch.float32)
        loss, _ = head_loss(
            hidden.to(dtype),
            Head(weight=leaf),
            weights.to(dtype if dtype == DOUBLE else torch.float32),
            targets,
            resolve_loss("reverse_kl"),
            chunk_elements=16 * 4,
        )
        loss.backward()
        gradients.append(leaf.grad.double())
    truth, found = gradients
    assert truth.norm() > 0, "vacuous"
    # bfloat16 logits alone cost about 1 %; 128 roundings of a running sum would cost far more.
    assert (found - truth).norm() / truth.norm() < 0.02


@pytest.mark.parametrize("num_tokens", [64, 3_000, 100_000], ids="over {} tokens".format)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**16], ids="scaled by {:g}".format)
def test_a_gradient_in_float16_is_right_whatever_is_divided_and_scaled(num_tokens, scale):
    """Against the float64 truth. 2^16 is torch's first loss scale, and infinite in float16; a part per
    100,000 is far below float16's range, also before it is multiplied by the head."""
    generator = torch.Generator().manual_seed(0)
    states, others = (torch.randn(32, 16, generator=generator).half() for _ in range(2))
    matrix = (0.1 * torch.randn(3_000, 16, generator=generator)).half()
    gradients = []
    for dtype in (DOUBLE, torch.float16):
        hidden = states.to(dtype, copy=True).requires_grad_()
        # Weights in float32 as under autocast.
        weight = matrix.to(DOUBLE if dtype == DOUBLE else torch.float32).requires_grad_()
        targets = Targets(
            token_ids=torch.zeros(32, dtype=torch.long),
            teacher_hidden=others.to(dtype),
            teacher_head=Head(weight=matrix.to(dtype)),
        )
        weights = torch.full((32,), 1 / num_tokens)
        loss, _ = head_loss(
            hidden, Head(weight=weight), weights, targets, resolve_loss("reverse_kl")
        )
        (loss * scale).backward()
        gradients.append([each.grad.double() for each in (hidden, weight)])
    for truth, found in zip(*gradients, strict=True):
        assert (found - truth).norm() < 2e-3 * truth.norm()


def test_an_evaluation_takes_no_gradient():
    """A head that trains asks for one in a pass without gradient too."""
    hidden, weight, _, weights, targets, _ = problem("reverse_kl")
    seen = []

    def watched(student, of_targets):
        seen.append(student.requires_grad)
        return resolve_loss("reverse_kl")(student, of_targets)

    head = Head(weight=torch.nn.Parameter(weight.detach().clone()))
    values = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            values.append(head_loss(hidden.detach(), head, weights, targets, watched)[0].item())
    assert values[0] == values[1] and set(seen[: len(seen) // 2]) == {True}
    assert set(seen[len(seen) // 2 :]) == {False}


def test_sampled_gradient_is_the_exact_reverse_kl_gradient_in_expectation():
    """Monte Carlo over every token weighted by its probability: the expectation, without sampling noise."""
    student, teacher = rows(1, 9, 0), rows(1, 9, 1)
    logits = student.clone().requires_grad_()
    exact = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)[0]
    logprobs = logits.log_softmax(-1)[0]
    surrogate = policy_gradient(logprobs, teacher[0])
    expected = torch.autograd.grad((student[0].exp() * surrogate).sum(), logits)[0]
    torch.testing.assert_close(expected, exact)


def test_policy_gradient_value_is_the_k1_estimate_and_the_clip_stops_the_gradient():
    student = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=DOUBLE, requires_grad=True)
    teacher = torch.tensor([-3.0, -0.5, -3.0, -0.5], dtype=DOUBLE)
    value = policy_gradient(student, teacher)
    torch.testing.assert_close(value, torch.tensor([2.0, -0.5, 2.0, -0.5], dtype=DOUBLE))
    # Ratio e^-0.5 < 1 - 0.2 on the first two, e^0.5 > 1 + 0.28 on the last two.
    sampling = torch.tensor([-0.5, -0.5, -1.5, -1.5], dtype=DOUBLE)
    clipped = policy_gradient(student, teacher, sampling_logprobs=sampling)
    gradient = torch.autograd.grad(clipped.sum(), student)[0]
    # Advantages: -, 0, -, -: PPO's minimum blocks a step that would go further out of the range.
    assert gradient[0] == 0 and gradient[2] != 0
    positive = policy_gradient(student, torch.zeros(4, dtype=DOUBLE), sampling_logprobs=sampling)
    gradient = torch.autograd.grad(positive.sum(), student)[0]
    assert gradient[0] != 0 and gradient[2] == 0


def test_reduction_weights_by_counting():
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0], dtype=DOUBLE)
    completion = torch.tensor([0, 0, 0, 4, 4, 7])
    valid = torch.tensor([True, True, True, True, True, False])

    def reduced(**settings):
        return reduction_weights(weights, completion, valid, **settings).tolist()

    assert reduced() == pytest.approx([0.4, 0, 0.2, 0.4, 0, 0])
    assert reduced(denominator="completion") == pytest.approx([0.2, 0, 0.1, 0.2, 0, 0])
    third = 1 / 3
    assert reduced(reduction="sample_mean") == pytest.approx(
        [third / 1.5, 0, third * 0.5 / 1.5, third, 0, 0]
    )
    assert reduced(reduction="sample_mean", denominator="completion") == pytest.approx(
        [third / 3, 0, third * 0.5 / 3, third / 2, 0, 0]
    )
    nothing = reduction_weights(
        torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=torch.long), valid[:3]
    )
    assert nothing.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="token_mean"):
        reduced(reduction="mean")


def test_anchor_weights_are_unbiased_reproducible_and_off_the_kept_tokens():
    kept = torch.arange(20_000) % 10 == 0
    valid = torch.arange(20_000) % 7 != 0
    completion = torch.arange(20_000) // 50
    draw = {"completion": completion, "fraction": 0.1, "seed": 3}
    weights = anchor_weights(kept, valid, step=5, **draw)
    assert torch.equal(weights, anchor_weights(kept, valid, step=5, **draw))
    assert not torch.equal(weights, anchor_weights(kept, valid, step=6, **draw))
    assert (weights[kept | ~valid] == 0).all()
    share_unselected = (valid & ~kept).sum() / valid.sum()
    # Sum of Horvitz-Thompson weights: share of unselected tokens, 3 sigma of a binomial count.
    sigma = math.sqrt(0.9 * 0.1 * float((valid & ~kept).sum())) / (0.1 * float(valid.sum()))
    assert abs(float(weights.sum()) - float(share_unselected)) < 3 * sigma


def test_bad_input():
    with pytest.raises(ConfigError, match="Did you mean 'reverse_kl'"):
        resolve_loss("revers_kl")
    hidden, weight, _, weights, targets, function = problem("reverse_kl")
    with pytest.raises(ShapeError, match="hidden has 3 positions"):
        head_loss(hidden[:3], Head(weight=weight), weights, targets, function)
    hidden[2] = math.nan
    with pytest.raises(NumericsError, match="selected position 2 of 4"):
        head_loss(hidden, Head(weight=weight), weights, targets, function)
    without = Targets(token_ids=targets.token_ids)
    with pytest.raises(ShapeError, match="needs the teacher's hidden states"):
        head_loss(hidden, Head(weight=weight), weights, without, function)
