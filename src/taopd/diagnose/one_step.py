"""The one-step protocol: does a step on what a selector keeps bring the student nearer to the teacher?

From one frozen batch every selector gets one optimizer step from the same weights, at the same budget.
Then the fall of both divergences is measured on the tokens it kept, on the other tokens of the same
contexts, and on fresh contexts of other prompts; and the score before the step is compared with the gain
of every token after it. Nothing of the trainer's loop is in the way: one gradient, one update, one
measurement. The library's own selection, reduction and loss are used, in evaluation mode.

Two optimizers: AdamW from a fresh state, whose first step is nearly the sign of the gradient, and plain
gradient descent. Two variants of each: `raw`, the same learning rate for every selector, and `equal_norm`,
every update rescaled to one common L2 norm: a mean over few tokens has the larger gradient, and a longer
step is no better choice of tokens. The common norm is that of an AdamW step in which every parameter moves
by the learning rate; descent's raw rate is set so that full distillation takes a step of that norm.

A gain is a difference of two float32 sums: below about 1e-6 nats per token it is rounding, and so is a rank
correlation of such gains. Raise the learning rate until the gains are clear of that.

Source: METHOD section 4.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.diagnose.bank import Rollouts
from taopd.diagnose.bank.score import divergences, known_positions, measuring, rollout_states
from taopd.errors import ConfigError, DataError, suggest
from taopd.losses import (
    LOSSES,
    Targets,
    head_loss,
    needs_teacher_distribution,
    resolve_loss,
)
from taopd.models.batch import SEQUENCE, Positions, micro_batches, trim
from taopd.models.forward import State, backbone_forward, on_device
from taopd.selectors import SELECTORS, check_budget, resolve_selector
from taopd.signals import SignalTable, concatenate, exact_signals, signal_table

ONE_STEP_SELECTORS = (
    "full",
    "random",
    "teachability",
    "teachability+entropy",
    "tip",
    "entropy",
    "divergence",
    "compatibility",
    "incompatible",
)
OPTIMIZERS = ("adamw", "sgd")
VARIANTS = ("raw", "equal_norm")
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStepSettings:
    """What every selector's step has in common."""

    selectors: tuple[str, ...] = ONE_STEP_SELECTORS
    budget: float = 0.05
    score_top_k: int = 16
    loss: str = "reverse_kl"
    learning_rate: float = 1e-5
    """Of AdamW; also sets the common norm."""
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    """0: the update is the gradient's alone."""
    temperature: float = 1.0
    batch_size: int = 8
    """Completions in one forward."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.selectors:
            resolve_selector(name)
        if not self.selectors:
            raise ConfigError(f"no selectors.{suggest('', SELECTORS)}")
        check_budget(self.budget)
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r} is unknown.{suggest(self.loss, LOSSES)}")
        for name in ("learning_rate", "temperature", "score_top_k", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenBatch:
    """Rollouts scored before the step."""

    rollouts: Rollouts
    batch: dict[str, Tensor]
    positions: Positions
    token_ids: Tensor
    table: SignalTable
    teacher_states: list[State]
    teacher_logprobs: Tensor
    """Of the sampled tokens, nats."""
    before: dict[str, np.ndarray]
    """KL by direction before the step, nats."""


def freeze_batch(
    student: Any, teacher: Any, rollouts: Rollouts, settings: OneStepSettings, vocab_size: int
) -> FrozenBatch:
    """Score rollouts with both models; keeps the teacher's states.

    Raises:
        DataError: no completion token that both models know.
        NumericsError: NaN or infinite logits.
    """
    batch = on_device(rollouts.batch(), student)
    positions = known_positions(batch, vocab_size)
    if not len(positions):
        raise DataError("the batch holds no completion token that both models know")
    token_ids = batch["completion_ids"][positions.row, positions.column]
    needs = {need for name in settings.selectors for need in resolve_selector(name).needs}
    size = {"vocab_size": vocab_size, "batch_size": settings.batch_size}
    with measuring(student, teacher):
        teacher_states = list(rollout_states(teacher, rollouts, **size))
        chunks, start = [], 0
        for own, other in zip(
            rollout_states(student, rollouts, **size), teacher_states, strict=True
        ):
            rows = slice(start, start + own[0].shape[0])
            chunks.append(
                exact_signals(
                    *own,
                    *other,
                    token_ids[rows],
                    k=min(settings.score_top_k, vocab_size),
                    temperature=settings.temperature,
                    full_kl=not {"forward_kl", "reverse_kl"}.isdisjoint(needs),
                )
            )
            start = rows.stop
        signals = concatenate(chunks)
        assert signals.teacher_logprobs is not None
        frozen = FrozenBatch(
            rollouts=rollouts,
            batch=batch,
            positions=positions,
            token_ids=token_ids,
            table=signal_table(
                signals,
                response=positions.row,
                position=positions.column,
                valid=torch.ones_like(positions.row, dtype=torch.bool),
                needs=needs,
            ),
            teacher_states=teacher_states,
            teacher_logprobs=signals.teacher_logprobs,
            before={},
        )
    frozen.before.update(measure_divergences(student, frozen, settings, vocab_size))
    return frozen


def measure_divergences(
    student: Any, frozen: FrozenBatch, settings: OneStepSettings, vocab_size: int
) -> dict[str, np.ndarray]:
    """Both divergences of the student as it is now at a frozen batch's tokens, nats."""
    with measuring(student):
        states = rollout_states(
            student, frozen.rollouts, vocab_size=vocab_size, batch_size=settings.batch_size
        )
        values = divergences(
            states,
            frozen.teacher_states,
            num_tokens=len(frozen.positions),
            temperature=settings.temperature,
            locate=frozen.positions.describe,
        )
    return dict(zip(DIRECTIONS, values, strict=True))


def selection_gradient(
    student: Any,
    frozen: FrozenBatch,
    weights: Float[Tensor, " N"],
    settings: OneStepSettings,
    vocab_size: int,
) -> list[Tensor]:
    """Gradient of sum_i weights[i] loss_i by every trainable parameter, in evaluation mode."""
    forward = backbone_forward(vocab_size)
    loss_function = resolve_loss(settings.loss, k=settings.score_top_k)
    parameters = trainable(student)
    kept: Bool[Tensor, " N"] = weights != 0
    chosen = frozen.positions.spread(kept)
    student.zero_grad(set_to_none=True)
    start = 0
    training = student.training
    student.eval()
    try:
        for (rows, mask), (hidden, head) in zip(
            micro_batches(frozen.positions, settings.batch_size),
            frozen.teacher_states,
            strict=True,
        ):
            here = slice(start, start + int(mask.sum()))
            start = here.stop
            picked, kept_here = chosen[rows], kept[here]
            if not bool(kept_here.any()):
                continue
            part = trim({name: frozen.batch[name][rows] for name in SEQUENCE}, picked)
            states, own_head = forward(student, part)
            full = needs_teacher_distribution(settings.loss)
            loss, _ = head_loss(
                states[picked[part.rows, : part.num_completion]],
                own_head,
                weights[here][kept_here].float(),
                Targets(
                    token_ids=frozen.token_ids[here][kept_here],
                    teacher_hidden=hidden[kept_here] if full else None,
                    teacher_head=head if full else None,
                    teacher_logprobs=frozen.teacher_logprobs[here][kept_here],
                    temperature=settings.temperature,
                ),
                loss_function,
            )
            loss.backward()
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters
        ]
    finally:
        student.zero_grad(set_to_none=True)
        student.train(training)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters a step may move.

    Raises:
        ConfigError: there are none, or they are in half precision, which rounds a small step away.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("the student has no trainable parameter; unfreeze it or its adapter")
    half = next((p.dtype for p in parameters if p.dtype.itemsize < 4), None)
    if half is not None:
        raise ConfigError(
            f"the student's trainable weights are {half}, which rounds a small step away; load it with "
            "dtype=float32"
        )
    return parameters


def update_of(
    parameters: list[torch.nn.Parameter],
    gradient: list[Tensor],
    optimizer: str,
    learning_rate: float,
    settings: OneStepSettings,
) -> list[Tensor]:
    """What one step would add to the parameters, which are left as they were."""
    if optimizer == "sgd":
        return [-learning_rate * grad for grad in gradient]
    before = [parameter.detach().clone() for parameter in parameters]
    adamw = torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    for parameter, grad in zip(parameters, gradient, strict=True):
        parameter.grad = grad
    adamw.step()
    updates = []
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            updates.append(parameter.detach() - old)
            parameter.copy_(old)
            parameter.grad = None
    return updates


@contextmanager
def moved(
    parameters: list[torch.nn.Parameter], update: list[Tensor], scale: float
) -> Iterator[None]:
    """The parameters plus `scale` times the update; exactly as before on leaving."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, step in zip(parameters, update, strict=True):
                parameter.add_(step, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)


def norm_of(tensors: list[Tensor]) -> float:
    """L2 norm over all tensors."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.double())) ** 2 for t in tensors))
