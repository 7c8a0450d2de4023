"""A language-model head as plain tensors, and its projection.

Signals and losses see a model only through this: hidden states times a weight, a bias, a scale and a
soft cap, in the order that TRL's kernels use them. `vocab_size` cuts the padding rows that some model
families append (151,936 against 152,064 rows for the same tokenizer), so that student and teacher are
distributions over the same real ids.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Final projection of a model: logits = softcap(scale (W h + b)) / temperature."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    """If set, logits become softcap * tanh(logits / softcap) (Gemma)."""

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same head in another dtype: one copy for all chunks instead of one per chunk."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def tile(self, start: int, stop: int) -> "Head":
        """The head of the ids start <= id < stop; views, no copy."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """W h + b in float32 (float64 for a float64 head), before scale, soft cap and temperature.

        The head is rounded to the states' dtype, as in the model's own forward. 16-bit products are summed
        and kept in float32: rounding a logit to bfloat16 makes ties of what the model told apart.
        """
        head = self.cast(hidden.dtype)
        raw = matmul(hidden, head.weight)
        return raw if head.bias is None else raw + head.bias.to(raw.dtype)

    def finish(self, raw: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
        """Scale, soft cap and temperature; differentiable."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1.0 else logits / temperature

    def logprobs(self, hidden: Float[Tensor, "N D"], temperature: float) -> Float[Tensor, "N V"]:
        """Log-probabilities over the vocabulary, nats, in the precision of `project`."""
        return self.finish(self.project(hidden), temperature).log_softmax(-1)


def matmul(hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
    """hidden @ weight.T in float32, or float64 for float64, also where a caller's autocast is on."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in (torch.float32, torch.float64):
            return hidden @ weight.T
        if hidden.device.type == "cuda" and not torch.is_grad_enabled():
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T
