"""Both implementations of the scores and the head's loss on a GPU, against float64 on the CPU."""

import importlib.util

import pytest
import torch

from taopd.kernels import Head, pair_score, reference, topk_score
from taopd.losses import Targets, head_loss, resolve_loss
from tests.kernels.cases import CASES, Case, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
IMPLS = ["chunked"]
if importlib.util.find_spec("triton") is not None:
    IMPLS.append("triton")
TOLERANCE = 2e-4
"""Nats, against float64 of the same rounded inputs: products of both dtypes are summed in float32."""


def on_gpu(case: Case) -> Case:
    head = case.head
    moved = Head(
        weight=head.weight.cuda(),
        bias=None if head.bias is None else head.bias.cuda(),
        scale=head.scale,
        softcap=head.softcap,
    )
    return Case(case.hidden.cuda(), moved, case.target_ids.cuda(), case.k, case.temperature)


def check(found, truth, case: Case, tolerance: float) -> None:
    """Values against the truth; ids where the truth tells its K-th and next apart."""
    largest = 0.0
    if case.hidden.numel():
        largest = float((case.hidden.double() @ case.head.weight.double().T).abs().max())
    tolerance = max(tolerance, tolerance * largest / 1e3)
    for name in ("target_logprobs", "topk_logprobs", "logsumexp", "entropy"):
        torch.testing.assert_close(
            getattr(found, name).double().cpu(), getattr(truth, name), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_in_float32(name, impl):
    case = CASES[name]()
    if impl == "triton" and case.k > 32:
        pytest.skip("the kernel keeps at most 32")
    exact = case.double()
    keywords = {"k": case.k, "temperature": case.temperature}
    truth = reference.topk_score(exact.hidden, exact.head, exact.target_ids, **keywords)
    moved = on_gpu(case)
    found = topk_score(moved.hidden, moved.head, moved.target_ids, impl=impl, **keywords)
    check(found, truth, case, TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wide_head_against_float64(dtype, impl):
    """A vocabulary of 50,000 and a width of 1,024, with logits of standard deviation 2."""
    case = make_case(96, 50_021, 1024, 16, dtype=dtype, sharpness=2 / 32)
    exact = case.double()
    truth = reference.topk_score(exact.hidden, exact.head, exact.target_ids, k=16)
    moved = on_gpu(case)
    found = topk_score(moved.hidden, moved.head, moved.target_ids, k=16, impl=impl)
    check(found, truth, case, TOLERANCE)
    assert (found.topk_ids.cpu() == truth.topk_ids).float().mean() > 0.999


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disagreement_and_compatibility_against_float64(dtype, impl):
    student = make_case(64, 20_011, 256, 16, dtype=dtype, sharpness=1 / 8)
    teacher = make_case(64, 20_011, 384, 16, dtype=dtype, sharpness=1 / 8)
    a, b = student.double(), teacher.double()
    truth = reference.pair_score(a.hidden, a.head, b.hidden, b.head, a.target_ids, k=16)
    moved, other = on_gpu(student), on_gpu(teacher)
    found = pair_score(
        moved.hidden, moved.head, other.hidden, other.head, moved.target_ids, k=16, impl=impl
    )
    for name in ("disagreement", "reverse_disagreement", "compatibility", "bhattacharyya"):
        torch.testing.assert_close(
            getattr(found, name).double().cpu(), getattr(truth, name), atol=5e-4, rtol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_loss_and_its_gradients_against_float64(dtype):
    case = make_case(48, 5003, 128, 16, dtype=dtype, sharpness=2 / 11)
    teacher = make_case(48, 5003, 160, 16, dtype=dtype, sharpness=2 / 13)

    def run(hidden, weight, other):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        targets = Targets(
            token_ids=case.target_ids.to(hidden.device),
            teacher_hidden=other.hidden.to(hidden.device),
            teacher_head=Head(weight=other.head.weight.to(hidden.device)),
        )
        weights = torch.full((48,), 1 / 48, device=hidden.device)
        loss = head_loss(hidden, Head(weight=weight), weights, targets, resolve_loss("reverse_kl"))[
            0
        ]
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    exact = run(case.hidden.double(), case.head.weight.double(), teacher.double())
    found = run(case.hidden.cuda(), case.head.weight.cuda(), teacher)
    # Gradients come out in the inputs' dtype: bfloat16 rounds them once more, to 3 digits.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for ours, truth in zip(found, exact, strict=True):
        error = (ours.double().cpu() - truth).norm() / truth.norm()
        assert error < tolerance, float(error)


@pytest.mark.parametrize("impl", IMPLS)
def test_peak_memory_does_not_grow_with_positions_times_vocabulary(impl):
    """Above inputs: the chunked scan holds four tiles of 128 MiB for any number of rows; the kernel none."""
    peaks = []
    for num_rows in (4096, 16_384):
        hidden = torch.randn(num_rows, 256, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(100_003, 256, device="cuda", dtype=torch.bfloat16) / 16
        targets = torch.zeros(num_rows, dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        topk_score(hidden, weight, targets, k=16, impl=impl)
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    assert peaks[1] < 640, peaks
    assert peaks[1] - peaks[0] < 64, peaks
