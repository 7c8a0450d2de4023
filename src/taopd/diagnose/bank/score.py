"""Scoring of a bank's rollouts: all features before training, and both KL divergences after it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taopd.diagnose.bank.token_features import (
    FEATURES,
    SUPPORT_FEATURES,
    chunked_logprobs,
    collect_features,
    quadrant_columns,
)
from taopd.errors import DataError
from taopd.losses import forward_kl, reverse_kl
from taopd.models.batch import Positions, Rollouts, teacher_side
from taopd.models.forward import State, backbone_forward, on_device, states_at
from taopd.models.own_forward import compare_with_own_forward, require_agreement


@contextmanager
def measuring(*models: torch.nn.Module) -> Iterator[None]:
    """Context of evaluation mode without gradients; restores every model's mode."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def known_positions(batch: dict[str, Tensor], vocab_size: int) -> Positions:
    """The completion positions whose token both models know."""
    mask = batch["completion_mask"].bool()
    return Positions.of(mask & (batch["completion_ids"] < vocab_size))


def locate(completion: Any, position: Any, row: int) -> str:
    """Completion and position of a row of a bank, in words."""
    return f"completion {int(completion[row])} of the bank, position {int(position[row])}"


def score_rollouts(
    student: Any,
    teacher: Any,
    rollouts: Rollouts,
    settings: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The columns of `tokens.parquet` as arrays, and the teacher's top-K (ids, log-probs).

    Raises:
        DataError: no token is known to both, or a model is scored otherwise than its own forward computes.
    """
    vocab_size = settings["vocab_size"]
    batch = on_device(rollouts.batch(), student)
    positions = known_positions(batch, vocab_size)
    if not len(positions):
        raise DataError(
            f"the bank would be empty: no completion token is among the {vocab_size} ids that both "
            "models know"
        )
    target_ids = batch["completion_ids"][positions.row, positions.column]
    forward = backbone_forward(vocab_size)
    side = teacher_side(batch)
    with measuring(student, teacher):
        for name, model, read in (("student", student, batch), ("teacher", teacher, side)):
            padded = settings["batch_size"] > 1
            found = compare_with_own_forward(forward, model, model, read, vocab_size, padded=padded)
            require_agreement(name, found)
        chunks = chunked_logprobs(
            states_at(forward, student, batch, positions, settings["batch_size"]),
            states_at(forward, teacher, side, positions, settings["batch_size"]),
            temperature=settings["temperature"],
            locate=partial(locate, positions.row, positions.column),
        )
        features, topk_ids, topk_logprobs = collect_features(
            chunks, target_ids, ks=settings["k"], progress=progress
        )
    row, column = positions.row.cpu(), positions.column.cpu()
    features |= quadrant_columns(features, row, column, settings["k"])
    integers = {
        "completion": row,
        "prompt": torch.tensor(rollouts.prompts)[row],
        "position": column,
        "token_id": target_ids.cpu(),
    }
    columns = {name: values.to(torch.int32).numpy() for name, values in integers.items()}
    names = [
        *FEATURES,
        *(f"{f}_k{k}" for k in settings["k"] for f in (*SUPPORT_FEATURES, "quadrant")),
    ]
    for name in names:
        kind = torch.float64
        if name.startswith("quadrant"):
            kind = torch.int8
        elif name.endswith("_rank"):
            kind = torch.int32
        columns[name] = features[name].to(kind).numpy()
    return columns, (topk_ids, topk_logprobs)


def divergences(
    student_states: Iterable[State],
    teacher_states: Iterable[State],
    *,
    num_tokens: int,
    temperature: float,
    locate: Callable[[int], str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Forward and reverse KL of all positions over the shared vocabulary, nats; NaN where the student is.

    Args:
        progress: called with (positions done, positions in all).

    Raises:
        NumericsError: on NaN or infinite logits of the teacher.
    """
    forward, reverse = np.empty(num_tokens), np.empty(num_tokens)
    for rows, student, teacher in chunked_logprobs(
        student_states,
        teacher_states,
        temperature=temperature,
        locate=locate,
        tolerate_student=True,
    ):
        forward[rows] = forward_kl(student, teacher).double().cpu().numpy()
        reverse[rows] = reverse_kl(student, teacher).double().cpu().numpy()
        if progress is not None:
            progress(rows.stop, num_tokens)
    return forward, reverse
