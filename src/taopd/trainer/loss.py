"""The terms of a micro-batch's loss: what they read, and their values from the student's states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head
from taopd.losses import LossFunction, Targets, head_loss
from taopd.models.batch import Positions, Trimmed
from taopd.models.scoring import Scored


@dataclass(frozen=True, slots=True)
class Term:
    """One model to compare the student with, at the tokens where a column of weights is not zero."""

    weights: str
    """`<this>_weights` [B, T] is the whole reduction, coefficient included."""
    states: str
    """`<this>_hidden` are the other model's states at these tokens, one tensor per row; may be absent."""
    head: Head | None
    """None where the other model is asked for log-probs and never read."""
    function: LossFunction


def loss_terms(
    read_head: Callable[[], Head],
    hidden: Float[Tensor, "b n D"],
    *,
    terms: list[Term],
    part: Trimmed,
    inputs: Mapping[str, Any],
    temperature: float,
) -> list[Float[Tensor, ""]]:
    """Head and loss of each term at its tokens alone.

    Args:
        read_head: gives the student's. Read after its states, so that the backward reaches the head before
            the backbone: FSDP2 reduces the head's gradient together with the last norm's, and would miss it.
        hidden: student's states that predict the part's completion tokens.
        inputs: completion_ids and the columns of `scoring.loss_inputs`, on the whole micro-batch.

    Raises:
        NumericsError: a loss is NaN or infinite; names completion and position.
    """
    losses, head = [], read_head()
    for term in terms:
        weights, other = inputs[f"{term.weights}_weights"], inputs.get(f"{term.states}_hidden")
        chosen = weights != 0
        states = hidden[chosen[part.rows, : part.num_completion]]
        targets = targets_at(inputs, chosen, other, term.head, temperature)
        try:
            losses.append(head_loss(states, head, weights[chosen], targets, term.function)[0])
        except NumericsError as error:
            assert error.index is not None
            place = Positions.of(chosen)
            row = int(inputs["batch_row"][place.row[error.index]])
            where = f"completion {row} of the batch, position {int(place.column[error.index])}"
            raise NumericsError(f"{term.weights} term: {error} ({where})") from error
    return losses


def with_value(loss: Any, value: Float[Tensor, ""]) -> Any:
    """A loss (or a tuple that begins with one) with its float32 value, and its gradient.

    What leaves a wrapper's forward may be rounded: FSDP2 hands it out in the compute dtype.
    """
    if isinstance(loss, tuple):
        return with_value(loss[0], value), *loss[1:]
    return value + (loss.float() - loss.float().detach())


def loss_inputs(
    positions: Positions,
    scored: Scored,
    loss_weights: Float[Tensor, " N"],
    anchor_weights: Float[Tensor, " N"],
) -> dict[str, Any]:
    """What a micro-batch's loss reads: columns on the padded batch [B, T], float32, and states by row."""
    signals = scored.signals
    columns = {
        "loss_weights": loss_weights,
        "anchor_weights": anchor_weights,
        "entropy": signals.entropy,
        "teacher_logprobs": signals.teacher_logprobs,
        "sampling_logprobs": signals.student_logprobs,
    }
    out: dict[str, Any] = {
        name: positions.spread(values.float())
        for name, values in columns.items()
        if values is not None
    }
    out["batch_row"] = torch.arange(positions.shape[0], device=positions.row.device)
    if scored.teacher_hidden is not None:
        out["teacher_hidden"] = positions.by_row(scored.teacher_hidden, loss_weights != 0)
    if scored.student_hidden is not None:
        everywhere = torch.ones_like(positions.row, dtype=torch.bool)
        out["scored"] = positions.spread(everywhere)
        with torch.enable_grad():
            out["student_hidden"] = positions.by_row(scored.student_hidden, everywhere)
    return out


def targets_at(
    inputs: Mapping[str, Any],
    chosen: Bool[Tensor, "B T"],
    hidden: list[Tensor] | None,
    head: Head | None,
    temperature: float,
) -> Targets:
    """What the student is compared with at the chosen positions of a micro-batch.

    Args:
        inputs: completion_ids and the columns of `loss_inputs`.
        hidden: the other model's states at these positions, one tensor per row; None: the loss reads
            log-probs of the sampled token only.
    """
    sampling = inputs.get("sampling_logprobs")
    return Targets(
        token_ids=inputs["completion_ids"][chosen],
        teacher_hidden=None if hidden is None else torch.cat(hidden),
        teacher_head=None if hidden is None else head,
        teacher_logprobs=inputs["teacher_logprobs"][chosen],
        sampling_logprobs=None if sampling is None else sampling[chosen],
        temperature=temperature,
    )
