"""The loss of a micro-batch: what it reads, its terms, and the value of each from the student's states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head
from taopd.losses import (
    LossFunction,
    Targets,
    by_reach,
    ended_alike,
    head_loss,
    needs_teacher_distribution,
    resolve_loss,
)
from taopd.models.batch import Positions, Trimmed
from taopd.models.scoring import Scored
from taopd.models.stop_tokens import merged_ids
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.scored_batch import ScoredBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What the loss of a micro-batch reads: columns of the padded batch [B, T], and states by completion.

    TRL shuffles and splits a generation batch as a mapping of tensors and lists with one entry a completion:
    these travel in it under their names here.
    """

    prompt_mask: Int[Tensor, "B P"]
    completion_mask: Int[Tensor, "B T"]
    completion_ids: Int[Tensor, "B T"]
    batch_row: Int[Tensor, " B"]
    """Which completion of the generation batch each one is."""
    loss_weights: Float[Tensor, "B T"]
    """The whole reduction: selection weight over the global denominator; 0 where a token does not train."""
    anchor_weights: Float[Tensor, "B T"]
    """Likewise of the KL penalty to the reference model, its coefficient included."""
    scored: Bool[Tensor, "B T"]
    """Tokens with signals: neither padding nor a tool's result, and known to both models."""
    entropy: Float[Tensor, "B T"]
    """Of the student, nats, to be logged; 0 where nothing was scored."""
    teacher_logprobs: Float[Tensor, "B T"] | None = None
    """Of the sampled tokens, nats."""
    sampling_logprobs: Float[Tensor, "B T"] | None = None
    """Of the policy that sampled; None: it is the student as it is."""
    teacher_index: Int[Tensor, " B"] | None = None
    """Which of several teachers each completion has; None: there is one."""
    teacher_hidden: list[Tensor] | None = None
    """The teacher's states where `loss_weights` is not 0; None: the loss reads log-probs alone."""
    reach: Float[Tensor, "B T"] | None = None
    """`method: reach`: r of a selected token, 1 of one that is held to the teacher."""
    held: Bool[Tensor, "B T"] | None = None
    """Tokens that are held to the teacher; None: nothing is, or it makes no difference to the loss."""
    reference_hidden: list[Tensor] | None = None
    """The reference model's states where `anchor_weights` is not 0."""
    student_hidden: list[Tensor] | None = None
    """The student's at all `scored` tokens, where the scoring pass is the training forward."""

    @staticmethod
    def of(batch: Mapping[str, Any]) -> "LossInputs":
        """Those of a micro-batch, as `loss_columns` puts them into the generation batch."""
        names = [field.name for field in fields(LossInputs)]
        return LossInputs(**{name: batch[name] for name in names if name in batch})

    @property
    def active(self) -> Bool[Tensor, "B T"]:
        """Tokens that enter the loss."""
        return (self.loss_weights != 0) | (self.anchor_weights != 0)


@torch.no_grad()
def loss_columns(scored: Scored, selected: ScoredBatch, args: TeachabilityConfig) -> dict[str, Any]:
    """The fields of `LossInputs` that scoring and selection leave, by name, of this process; float32."""
    positions, signals = selected.positions, scored.signals
    # The choice is on the CPU, where all processes made it.
    device, here = positions.row.device, selected.local
    loss_weights = selected.choice.loss_weights[here].float().to(device)
    # Its log-probs are kept where the student will have moved on from the policy that sampled.
    off_policy = args.num_iterations > 1
    values = {
        "loss_weights": loss_weights,
        "anchor_weights": selected.choice.anchor_weights[here].float().to(device),
        "entropy": signals.entropy if signals.full_entropy is None else signals.full_entropy,
        "teacher_logprobs": signals.teacher_logprobs,
        "sampling_logprobs": signals.student_logprobs if off_policy else None,
    }
    columns: dict[str, Any] = {
        name: positions.spread(column.float())
        for name, column in values.items()
        if column is not None
    }
    columns["scored"] = positions.mask
    # Completions are shuffled before they are split: each carries where it came from.
    columns["batch_row"] = torch.arange(positions.shape[0], device=positions.row.device)
    reach, held = selected.choice.divided(here)
    columns |= {
        name: positions.spread(column.to(device))
        for name, column in (("reach", reach), ("held", held))
        if column is not None
    }
    if (by_row := scored.teacher_by_row(positions, loss_weights != 0)) is not None:
        columns["teacher_hidden"] = by_row
    if scored.student_hidden is not None:
        # Selection runs without gradient; these states carry the graph of the scoring pass.
        with torch.enable_grad():
            everywhere = torch.ones_like(positions.row, dtype=torch.bool)
            columns["student_hidden"] = positions.by_row(scored.student_hidden, everywhere)
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One model to compare the student with, at the tokens where its weights are not 0."""

    name: str
    """For messages."""
    weights: Float[Tensor, "B T"]
    hidden: list[Tensor] | None
    """The other model's states at these tokens; None: the function reads log-probs alone."""
    head: Head | None
    function: LossFunction


def loss_of_run(
    args: TeachabilityConfig,
    stop_ids: Sequence[int],
    foreign_ends: Sequence[int],
    own_ends: Sequence[int],
    vocab_size: int,
) -> LossFunction:
    """The loss at one token that the settings name; under `method: reach` divided by reach.

    Args:
        own_ends: ids at which the student's sampler stops.
        vocab_size: of what both models have; a teacher may end with an id beyond it.
    """
    merged = merged_ids(args.stop_tokens, stop_ids)
    resolve = partial(
        resolve_loss,
        beta=float(args.beta or 0.0),
        k=args.score_top_k,
        clip_low=args.ppo_clip_low,
        clip_high=args.ppo_clip_high,
    )
    loss = resolve(args.loss, merged_ids=merged)
    is_exact = needs_teacher_distribution(args.loss)
    exact = partial(resolve, args.loss if is_exact else args.anchor_loss)
    own, foreign = ([i for i in ids if i < vocab_size] for ids in (own_ends, foreign_ends))
    at_held = None
    if foreign:
        at_held = ended_alike(exact, foreign, own, merged_ids=merged)
    elif not is_exact:
        at_held = exact(merged_ids=merged)
    return by_reach(loss, at_held, merged_ids=merged, foreign_ends=foreign)


def distillation_terms(
    inputs: LossInputs, heads: Sequence[Head | None], function: LossFunction
) -> list[Term]:
    """The distillation from each teacher, at the tokens of its completions.

    Args:
        heads: of the teachers; None for one that is not here, whose losses read log-probs alone.
    """
    if inputs.teacher_index is None:
        weights, hidden = inputs.loss_weights, inputs.teacher_hidden
        return [Term(name="loss", weights=weights, hidden=hidden, head=heads[0], function=function)]
    terms = []
    for teacher, head in enumerate(heads):
        own = inputs.teacher_index == teacher
        weights, states = inputs.loss_weights * own[:, None], None
        if inputs.teacher_hidden is not None:
            assert head is not None
            rows = [inputs.teacher_hidden[row] for row in own.nonzero()[:, 0].tolist()]
            # States of different teachers have different widths: each term joins its own alone.
            states = [row for row in rows if row.numel()] or [head.weight[:0]]
        terms.append(
            Term(name="loss", weights=weights, hidden=states, head=head, function=function)
        )
    return terms


def term_loss(
    term: Term,
    hidden: Float[Tensor, "b n D"],
    head: Head,
    *,
    part: Trimmed,
    inputs: LossInputs,
    temperature: float,
) -> Float[Tensor, ""]:
    """Head and loss function at the tokens of a term alone; float32, nats.

    Args:
        hidden: the student's states that predict the completion tokens of the part; `head` is the student's.

    Raises:
        NumericsError: the loss is NaN or infinite; names completion and position.
    """
    # The term's own tokens: those of the anchor and of the distillation do not overlap.
    chosen = term.weights != 0

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[chosen]

    targets = Targets(
        token_ids=inputs.completion_ids[chosen],
        teacher_hidden=None if term.hidden is None else torch.cat(term.hidden),
        teacher_head=None if term.hidden is None else term.head,
        teacher_logprobs=at(inputs.teacher_logprobs),
        sampling_logprobs=at(inputs.sampling_logprobs),
        temperature=temperature,
        reach=at(inputs.reach),
        held=at(inputs.held),
    )
    states = hidden[chosen[part.rows, : part.num_completion]]
    try:
        return head_loss(states, head, term.weights[chosen], targets, term.function)[0]
    except NumericsError as error:
        assert error.index is not None
        # The head counts rows of its input; a person looks for a completion and a token.
        row, position = Positions.of(chosen).place(error.index)
        completion = int(inputs.batch_row[row])
        where = f"completion {completion} of the batch, position {position}"
        raise NumericsError(
            f"{term.name} term: {error} ({where})", completion=completion, position=position
        ) from error


def with_value(loss: Any, value: Float[Tensor, ""]) -> Any:
    """A loss (or a tuple that begins with one) with its float32 value, and its gradient.

    What leaves a wrapper's forward may be rounded: FSDP2 hands it out in the compute dtype.
    """
    if isinstance(loss, tuple):
        return with_value(loss[0], value), *loss[1:]
    return value + (loss.float() - loss.float().detach())
