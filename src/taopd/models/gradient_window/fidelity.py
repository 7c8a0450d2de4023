"""How well a windowed gradient agrees with the exact one: its cosine and its norm.

Both gradients are taken with `torch.autograd.grad`, which neither reads nor writes `.grad` and runs no
gradient hook, so a check in the middle of gradient accumulation changes nothing. Costs one exact forward and
backward, one windowed, and two copies of the trainable parameters' gradients.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Fidelity(NamedTuple):
    """Windowed against exact gradient, over all trainable parameters at once."""

    cosine: float
    """In [-1, 1]; NaN if either gradient is zero."""
    norm_ratio: float
    """||windowed|| / ||exact||; NaN if the exact gradient is zero."""


def gradients_of(loss: Float[Tensor, ""], model: nn.Module) -> list[Tensor | None]:
    """Gradient of a loss by every trainable parameter, taken aside: no `.grad` changes, no hook runs."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not `backward`: gradients that the step has gathered so far must stay as they are.
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def compare_gradients(exact: list[Tensor | None], sparse: list[Tensor | None]) -> Fidelity:
    """How well the second gradient agrees with the first."""
    exact_norm, sparse_norm = _product(exact, exact) ** 0.5, _product(sparse, sparse) ** 0.5
    if exact_norm == 0.0:
        return Fidelity(cosine=float("nan"), norm_ratio=float("nan"))
    if sparse_norm == 0.0:
        return Fidelity(cosine=float("nan"), norm_ratio=0.0)
    cosine = _product(exact, sparse) / (exact_norm * sparse_norm)
    return Fidelity(cosine=cosine, norm_ratio=sparse_norm / exact_norm)


def _product(left: list[Tensor | None], right: list[Tensor | None]) -> float:
    pairs = zip(left, right, strict=True)
    return sum(
        float((a.float() * b.float()).sum(dtype=torch.float64))
        for a, b in pairs
        if a is not None and b is not None
    )
