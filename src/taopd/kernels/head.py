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

CHUNK_ELEMENTS = 2**24
"""Logits held at a time, entries of float32 (64 MiB a tensor); measured flat from 2**22 to 2**25 on a CPU."""


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
        return replace(self, weight=self.weight.to(dtype))

    def project(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """W h + b in float32 (float64 for a float64 head), before scale, soft cap and temperature."""
        raw = hidden @ self.weight.T
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return raw if self.bias is None else raw + self.bias.to(raw.dtype)

    def finish(self, raw: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
        """Scale, soft cap and temperature; differentiable."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1.0 else logits / temperature

    def logprobs(self, hidden: Float[Tensor, "N D"], temperature: float) -> Float[Tensor, "N V"]:
        """Log-probabilities over the vocabulary, nats, in the precision of `project`."""
        return self.finish(self.project(hidden), temperature).log_softmax(-1)


def positions_per_chunk(vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """How many positions to project at a time, so that one logits tensor has `chunk_elements` entries."""
    return max(1, chunk_elements // vocab_size)
