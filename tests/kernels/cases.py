"""Inputs that every implementation must get right, by name; shared by the CPU and interpreter tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from taopd.kernels import Head


@dataclass(frozen=True)
class Case:
    """One call of `topk_score`."""

    hidden: Tensor
    head: Head
    target_ids: Tensor
    k: int
    temperature: float = 1.0

    def double(self) -> "Case":
        """The same numbers in float64: what the truth is computed from."""
        head = self.head.cast(torch.float64)
        return Case(self.hidden.double(), head, self.target_ids, self.k, self.temperature)


def make_case(
    num_rows: int,
    vocab_size: int,
    width: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    temperature: float = 1.0,
    sharpness: float = 1.0,
    integers: bool = False,
    **head,
) -> Case:
    """Random states and head; `integers` makes logits exact and full of ties."""
    generator = torch.Generator().manual_seed(num_rows + vocab_size + width + k)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    return Case(
        hidden=(sharpness * draw(num_rows, width)).to(dtype),
        head=Head(
            weight=draw(vocab_size, width).to(dtype),
            bias=draw(vocab_size).to(dtype) if bias else None,
            **head,
        ),
        target_ids=torch.randint(vocab_size, (num_rows,), generator=generator),
        k=k,
        temperature=temperature,
    )


def minus_infinity() -> Case:
    """A head that forbids most of its ids through the bias: fewer than K are left."""
    case = make_case(5, 300, 8, 7, bias=True)
    bias = torch.full_like(case.head.bias, -torch.inf)
    bias[[3, 150, 299]] = torch.tensor([0.5, 1.0, -1.0])
    targets = torch.tensor([3, 150, 299, 3, 3])
    return Case(case.hidden, Head(weight=case.head.weight, bias=bias), targets, case.k)


def non_contiguous() -> Case:
    """Transposed states and a head with every second row of a matrix."""
    case = make_case(11, 600, 16, 3)
    head = Head(weight=case.head.weight.T.contiguous().T[::2])
    return Case(case.hidden.T.contiguous().T, head, case.target_ids % 300, case.k)


CASES = {
    "aligned": lambda: make_case(64, 512, 32, 16),
    "ragged": lambda: make_case(13, 997, 17, 7),
    "no_row": lambda: make_case(0, 50, 8, 3),
    "one_row": lambda: make_case(1, 301, 8, 3),
    "k_is_1": lambda: make_case(7, 211, 8, 1),
    "k_is_vocabulary": lambda: make_case(5, 31, 8, 31),
    "tile_does_not_divide": lambda: make_case(9, 1025, 16, 16),
    "ties": lambda: make_case(17, 1300, 6, 16, integers=True),
    "all_tied": lambda: make_case(3, 700, 1, 16, integers=True, sharpness=0.0),
    "large_logits": lambda: make_case(9, 400, 4, 5, sharpness=4e3),
    "bias_scale_softcap_temperature": lambda: make_case(
        19, 500, 24, 8, bias=True, scale=0.5, softcap=4.0, temperature=1.7
    ),
    "minus_infinity": minus_infinity,
    "non_contiguous": non_contiguous,
}
TOLERANCE = 1e-4
"""Nats, absolute, against float64 in float32; logits of 1e4 are judged relative to their size."""
ROUNDING = 2**-23
"""One rounding of a float32, relative; at a logit of 4e4 it is 0.004 nats, whatever the arithmetic."""


def compare(found, truth, case: Case) -> None:
    """Every field against the truth; ids must be equal where logits are exact or well apart."""
    tolerance = TOLERANCE
    if case.hidden.numel():
        largest = float((case.hidden.double() @ case.head.weight.double().T).abs().max())
        tolerance = max(TOLERANCE, TOLERANCE * largest / 1e3, ROUNDING * largest)
    for name in ("target_logprobs", "topk_logprobs", "logsumexp", "entropy", "want_logprobs"):
        expected = getattr(truth, name)
        if expected is None:
            continue
        torch.testing.assert_close(
            getattr(found, name).double(), expected, atol=tolerance, rtol=0, msg=None
        )
    assert torch.equal(found.topk_ids, truth.topk_ids)
