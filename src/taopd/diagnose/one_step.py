"""The one-step protocol: the gain of one optimizer step on the tokens that a selector keeps.

From one frozen batch every selector gets one optimizer step from the same weights, at the same budget.
Then the fall of both divergences is measured on the tokens it kept, on the other tokens of the same
contexts, and on fresh contexts of other prompts. The score before the step is compared with the gain of
every token after it. The library's own selection, reduction and loss are used, in evaluation mode,
without the trainer's loop.

Two optimizers: AdamW from a fresh state, whose first step is nearly the sign of the gradient, and plain
gradient descent. Two variants of each: `raw`, the same learning rate for every selector, and `equal_norm`,
every update rescaled to one common L2 norm, because a mean over few tokens has the larger gradient. The
common norm is that of an AdamW step in which every parameter moves by the learning rate; descent's raw rate
is set so that full distillation takes a step of that norm.

A gain is a difference of two divergences of float32 logits: below about 1e-6 nats per token it is rounding
error, and so is a rank correlation of such gains. Choose a learning rate whose gains are well above that.

Source: docs/math.md, "The diagnostic".
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.diagnose.bank import Rollouts
from taopd.diagnose.bank.score import divergences, known_positions, measuring
from taopd.errors import ConfigError, DataError, require, require_known, suggest
from taopd.losses import (
    LOSSES,
    Targets,
    head_loss,
    needs_teacher_distribution,
    resolve_loss,
)
from taopd.models.batch import Positions, micro_batches
from taopd.models.forward import State, backbone_forward, bare, on_device, states_at, states_of
from taopd.models.output_head import read_head
from taopd.models.scoring import score_positions
from taopd.selectors import SELECTORS, check_budget, resolve_selector
from taopd.signals import SignalTable, signal_table

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
    """Settings of the step, the same for every selector."""

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
        require_known("loss", self.loss, LOSSES)
        for name in ("learning_rate", "temperature", "score_top_k", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")


def support_size(settings: OneStepSettings, vocab_size: int) -> int:
    """The support size of a step; the default one is cut to a small vocabulary.

    Raises:
        ConfigError: another one that is larger than the vocabulary.
    """
    k, default = settings.score_top_k, OneStepSettings().score_top_k
    require(k <= vocab_size or k == default, "k", k, f"at most the vocabulary of {vocab_size} ids")
    return min(k, vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenBatch:
    """Rollouts with the signals, targets and divergences before the step."""

    batch: dict[str, Tensor]
    positions: Positions
    targets: Targets
    """The sampled tokens and the teacher at these positions."""
    table: SignalTable
    before: dict[str, np.ndarray]
    """KL by direction before the step, nats."""

    def teacher_states(self, size: int) -> Iterator[State]:
        """The teacher's states and head per micro-batch of `size` rows."""
        hidden, head = self.targets.teacher_hidden, self.targets.teacher_head
        assert hidden is not None and head is not None
        counts = [int(mask.sum()) for _, mask in micro_batches(self.positions, size)]
        return ((part, head) for part in hidden.split(counts))


def freeze_batch(
    student: Any, teacher: Any, rollouts: Rollouts, settings: OneStepSettings, vocab_size: int
) -> FrozenBatch:
    """Rollouts scored with both models, the teacher's states kept.

    Raises:
        DataError: no completion token that both models know.
        NumericsError: NaN or infinite logits.
    """
    batch = on_device(rollouts.batch(), student)
    positions = known_positions(batch, vocab_size)
    if not len(positions):
        raise DataError("the batch holds no completion token that both models know")
    needs = {need for name in settings.selectors for need in resolve_selector(name).needs}
    with measuring(student, teacher):
        scored = score_positions(
            backbone_forward(vocab_size),
            student,
            teacher,
            batch,
            positions,
            micro_batch_size=settings.batch_size,
            k=support_size(settings, vocab_size),
            temperature=settings.temperature,
            keep_teacher_hidden=True,
            when="before the step",
            full_kl=not {"forward_kl", "reverse_kl"}.isdisjoint(needs),
        )
        frozen = FrozenBatch(
            batch=batch,
            positions=positions,
            targets=Targets(
                token_ids=batch["completion_ids"][positions.row, positions.column],
                teacher_hidden=scored.teacher_hidden,
                teacher_head=read_head(bare(teacher), vocab_size),
                teacher_logprobs=scored.signals.teacher_logprobs,
                temperature=settings.temperature,
            ),
            table=signal_table(
                scored.signals,
                completion=positions.row,
                position=positions.column,
                valid=torch.ones_like(positions.row, dtype=torch.bool),
                needs=needs,
            ),
            before={},
        )
    frozen.before.update(measure_divergences(student, frozen, settings, vocab_size))
    return frozen


def measure_divergences(
    student: Any, frozen: FrozenBatch, settings: OneStepSettings, vocab_size: int
) -> dict[str, np.ndarray]:
    """Both divergences of the student as it is now at a frozen batch's tokens, nats."""
    forward, size = backbone_forward(vocab_size), settings.batch_size
    with measuring(student):
        values = divergences(
            states_at(forward, student, frozen.batch, frozen.positions, size),
            frozen.teacher_states(size),
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
    forward, size = backbone_forward(vocab_size), settings.batch_size
    loss_function = resolve_loss(settings.loss, k=settings.score_top_k)
    parameters = trainable(student)
    kept: Bool[Tensor, " N"] = weights != 0
    selected = Positions.of(frozen.positions.spread(kept))
    targets, weights = frozen.targets[kept], weights[kept].float()
    if not needs_teacher_distribution(settings.loss):
        targets = replace(targets, teacher_hidden=None, teacher_head=None)
    student.zero_grad(set_to_none=True)
    try:
        with measuring(student), torch.enable_grad():
            start = 0
            for rows, mask in micro_batches(selected, size):
                tokens = slice(start, start + int(mask.sum()))
                start = tokens.stop
                if not bool(mask.any()):
                    continue
                hidden, head = states_of(
                    forward, student, frozen.batch, rows, mask, with_graph=True
                )
                loss, _ = head_loss(hidden, head, weights[tokens], targets[tokens], loss_function)
                loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        student.zero_grad(set_to_none=True)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters, in float32 or wider.

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
    """The update of one optimizer step; the parameters are left as they were."""
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
            updates.append(parameter - old)
            parameter.copy_(old)
            parameter.grad = None
    return updates


@contextmanager
def moved(
    parameters: list[torch.nn.Parameter], update: list[Tensor], scale: float
) -> Iterator[None]:
    """Context with `scale` times the update added to the parameters; restores them exactly."""
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
