"""The terms of a micro-batch's loss from the student's states: distillation, and the anchor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from taopd.kernels import Head
from taopd.losses import LossFunction, head_loss
from taopd.scoring import Trimmed, targets_at


@dataclass(frozen=True, slots=True)
class Term:
    """One model to compare the student with, at the tokens where a column of weights is not zero."""

    weights: str
    """`<this>_weights` [B, T] is the whole reduction, coefficient included."""
    states: str
    """`<this>_hidden` are the other model's states at these tokens, one tensor per row; may be absent."""
    head: Head
    function: LossFunction


def loss_terms(
    hidden: Float[Tensor, "b n D"],
    *,
    head: Head,
    terms: list[Term],
    part: Trimmed,
    inputs: Mapping[str, Any],
    temperature: float,
) -> list[Float[Tensor, ""]]:
    """Head and loss of each term at its tokens alone.

    Args:
        hidden: student's states that predict the part's completion tokens.
        head: the student's.
        inputs: completion_ids and the columns of `scoring.loss_inputs`, on the whole micro-batch.
    """
    losses = []
    for term in terms:
        weights, other = inputs[f"{term.weights}_weights"], inputs.get(f"{term.states}_hidden")
        chosen = weights != 0
        states = hidden[chosen[part.rows, : part.num_completion]]
        targets = targets_at(inputs, chosen, other, term.head, temperature)
        losses.append(head_loss(states, head, weights[chosen], targets, term.function)[0])
    return losses
