"""The loss at selected positions, from hidden states: heads, divergence and their backward, in chunks.

The value is sum_i weights[i] * loss_i, so its gradient with respect to the logits is known as soon as the
logits are: each chunk is projected once, its gradient is taken on the spot and folded into one gradient of
the hidden states and one float32 gradient of the head, and the logits are dropped. Nothing is recomputed
in the backward, which only scales by the incoming gradient. Cost: three student matmuls and one teacher
matmul per chunk; memory: one chunk of logits per model plus the head's gradient.

Why not `torch.utils.checkpoint` around plain autograd: it projects every chunk twice and accumulates the
head's gradient in the head's own dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import NumericsError, ShapeError
from taopd.kernels import Head, chunk_elements_on, positions_per_chunk
from taopd.kernels.head import matmul

GRADIENT_BLOCK = 2**14
"""Ids of one block of the head's gradient on a GPU; 128 MiB of float32 at a width of 2,048."""
LARGEST_EXPONENT = 100
"""By which a power of two may scale a row of float32 without leaving its range."""

LossFunction = Callable[[Tensor, "Targets"], Tensor]
"""(student log-probs [n, V], targets of these n positions) -> loss per position [n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the student is compared with at N positions. A loss function reads what it needs."""

    token_ids: Int[Tensor, " N"]
    """The sampled tokens."""
    teacher_hidden: Float[Tensor, "N Dt"] | None = None
    teacher_head: Head | None = None
    teacher_logprobs: Float[Tensor, " N"] | None = None
    """log p_T of the sampled token, nats."""
    sampling_logprobs: Float[Tensor, " N"] | None = None
    """log-prob of the sampled token under the policy that sampled it; None: the student itself."""
    temperature: float = 1.0
    reach: Float[Tensor, " N"] | None = None
    """r of a selected token, 1 of a held one, under `method: reach`."""
    held: Bool[Tensor, " N"] | None = None
    """Which are held to the teacher under `method: reach`."""
    distribution: Float[Tensor, "N V"] | None = None
    """The teacher's full log-probs, where they are at hand: the sampled reverse KL then has a baseline."""

    def __getitem__(self, rows: slice | Tensor) -> "Targets":
        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return Targets(
            token_ids=self.token_ids[rows],
            teacher_hidden=cut(self.teacher_hidden),
            teacher_head=self.teacher_head,
            teacher_logprobs=cut(self.teacher_logprobs),
            sampling_logprobs=cut(self.sampling_logprobs),
            temperature=self.temperature,
            reach=cut(self.reach),
            held=cut(self.held),
            distribution=cut(self.distribution),
        )

    def teacher_distribution(self) -> Float[Tensor, "N V"]:
        """The teacher's full log-probs at these positions, float32; without gradient.

        Raises:
            ShapeError: if neither they nor the teacher's states and head are here.
        """
        if self.distribution is not None:
            return self.distribution
        if self.teacher_head is None or self.teacher_hidden is None:
            raise ShapeError(
                "this loss needs the teacher's hidden states and head; none were given"
            )
        with torch.no_grad():
            return self.teacher_head.logprobs(self.teacher_hidden, self.temperature)


def _add_product(
    total: Float[Tensor, "V D"], grad: Float[Tensor, "n V"], hidden: Float[Tensor, "n D"]
) -> None:
    """total += grad^T hidden, summed in the precision of `total`."""
    if hidden.device.type != "cuda" or hidden.dtype != torch.bfloat16:
        total.addmm_(grad.T, hidden.to(total.dtype))
        return
    # A float32 product is 14 times slower on an H200; the factors are rounded, as autograd would, the sums
    # are not. In blocks of ids: the product would be as large as the head's gradient.
    rounded = grad.to(hidden.dtype)
    for start in range(0, total.shape[0], GRADIENT_BLOCK):
        ids = slice(start, start + GRADIENT_BLOCK)
        total[ids] += torch.mm(rounded[:, ids].T, hidden, out_dtype=total.dtype)


def _times_head(grad: Float[Tensor, "n V"], matrix: Float[Tensor, "V D"]) -> Float[Tensor, "n D"]:
    """grad matrix, in the dtype of `matrix`; of float16 in float32."""
    if matrix.dtype != torch.float16:
        return grad.to(matrix.dtype) @ matrix
    # A gradient over thousands of tokens is below float16's range, and a loss scaler multiplies only after
    # this product: each row is scaled by a power of two while it is in float16.
    exponent = torch.frexp(grad.abs().amax(1, keepdim=True)).exponent
    exponent = exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    scaled = torch.ldexp(grad, -exponent).to(matrix.dtype)
    return torch.ldexp(matmul(scaled, matrix.T), exponent)


class _HeadLoss(torch.autograd.Function):
    """Weighted sum of a per-position loss; gradients are taken chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, weights, head, targets, loss_function, chunk_elements):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        wide = accumulate if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias else None
        per_token = torch.zeros(hidden.shape[0], dtype=accumulate, device=hidden.device)
        size = positions_per_chunk(weight.shape[0], chunk_elements)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_head = head.cast(hidden.dtype)
            matrix = compute_head.weight.detach()
            for start in range(0, hidden.shape[0], size):
                rows = slice(start, start + size)
                raw = compute_head.project(hidden[rows])
                with torch.enable_grad():
                    raw = raw.detach().requires_grad_(any(ctx.needs_input_grad[:3]))
                    logprobs = head.finish(raw, targets.temperature).log_softmax(-1)
                    losses = loss_function(logprobs, targets[rows])
                    chunk_sum = (losses * weights[rows]).sum()
                per_token[rows] = losses.detach()
                if not raw.requires_grad:
                    continue
                (grad_raw,) = torch.autograd.grad(chunk_sum, raw)
                if grad_hidden is not None:
                    grad_hidden[rows] = _times_head(grad_raw, matrix)
                if grad_weight is not None:
                    _add_product(grad_weight, grad_raw, hidden[rows])
                if grad_bias is not None:
                    grad_bias += grad_raw.sum(0)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(per_token)
        return (per_token * weights).sum(), per_token

    @staticmethod
    def backward(ctx, grad_output, _grad_per_token):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
            # In the precision of the loss: the first factor of a loss scaler is above float16's range.
            return None if grad is None else (grad.to(grad_output.dtype) * grad_output).to(dtype)

        return (
            *map(scaled, (grad_hidden, grad_weight, grad_bias), ctx.dtypes),
            None,
            None,
            None,
            None,
            None,
        )


def head_loss(
    hidden: Float[Tensor, "N D"],
    head: Head,
    weights: Float[Tensor, " _"],
    targets: Targets,
    loss_function: LossFunction,
    *,
    chunk_elements: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """sum_i weights[i] * loss_i in float32, with gradients to `hidden`, the head's weight and its bias.

    Args:
        chunk_elements: entries of one chunk's logits; default that of the device.
        hidden: student's last hidden states at the selected positions; N may be 0 (the result is 0 with a
            valid graph, so that a rank without a selected token still takes part in the backward).
        weights: the whole reduction: selection weight over global denominator (`reduction.py`).

    Returns:
        The scalar loss, and the per-position losses without gradient (nats).

    Raises:
        NumericsError: if a loss is NaN or infinite.
        ShapeError: if lengths disagree.
    """
    if not hidden.shape[0] == weights.shape[0] == targets.token_ids.shape[0]:
        raise ShapeError(
            f"hidden has {hidden.shape[0]} positions, weights {weights.shape[0]}, targets "
            f"{targets.token_ids.shape[0]}; all must agree"
        )
    if targets.teacher_head is not None and targets.teacher_hidden is not None:
        # One cast for all chunks.
        cast = targets.teacher_head.cast(targets.teacher_hidden.dtype)
        targets = replace(targets, teacher_head=cast)
    chunk_elements = chunk_elements or chunk_elements_on(hidden.device.type)
    leaves: tuple[Tensor | None, ...] = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():
        # A parameter asks for its gradient in an evaluation too.
        leaves = tuple(None if leaf is None else leaf.detach() for leaf in leaves)
    loss, per_token = _HeadLoss.apply(
        *leaves, weights, head, targets, loss_function, chunk_elements
    )
    if not per_token.isfinite().all():
        row = int((~per_token.isfinite()).nonzero()[0])
        raise NumericsError(
            f"the loss is NaN or infinite at selected position {row} of {per_token.shape[0]}; look at the "
            "student's and the teacher's logits there",
            index=row,
        )
    return loss, per_token
