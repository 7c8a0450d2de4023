"""Runs a model on a padded batch without a trainer: backbone states, and the head beside them.

The head is applied elsewhere, in chunks. Positions are counted from the first real token, as in
generation: models with absolute positions (GPT-2) would otherwise count the padding on the left.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from taopd.errors import ConfigError
from taopd.kernels import Head
from taopd.models.batch import (
    SEQUENCE,
    Forward,
    Positions,
    Trimmed,
    micro_batches,
    positions_of,
    trim,
)
from taopd.models.output_head import inside_peft, read_head

State = tuple[Float[Tensor, "n D"], Head]
"""States that predict n tokens, and the head that reads them."""


def backbone_forward(vocab_size: int) -> Forward:
    """A `Forward` for a model outside any wrapper, its head cut to the first `vocab_size` ids."""
    return partial(_states, vocab_size=vocab_size)


def bare(model: Any) -> PreTrainedModel:
    """`inside_peft` of a model that is whole.

    Raises:
        ConfigError: if the weights are sharded over ranks.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            "the model's weights are sharded over ranks; measure its checkpoints with "
            "`taopd diagnose gain` instead"
        )
    return inside_peft(model)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """No layer recomputes its activations: for passes without gradient, in which there is nothing to save."""
    modules: list[Any] = list(model.modules())
    layers = [layer for layer in modules if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def backbone_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, num_completion: int
) -> Float[Tensor, "b n D"]:
    """States of a model, or of the model inside a PEFT wrapper, that predict the last n tokens."""
    backbone = inside_peft(model).base_model
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = positions_of(attention_mask)
    # Not the model's own head: it would make [tokens, vocabulary] logits of every position.
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    end = hidden.shape[1] - 1
    return hidden[:, end - num_completion : end]


def _states(model: Any, part: Trimmed, *, vocab_size: int) -> tuple[Tensor, Head]:
    model = bare(model)
    return backbone_states(model, *part.sequences), read_head(model, vocab_size)


def on_device(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def states_of(
    forward: Forward,
    model: Any,
    batch: Mapping[str, Tensor],
    rows: slice,
    mask: Bool[Tensor, "b T"],
    *,
    with_graph: bool = False,
    first_column: int | None = None,
) -> tuple[Float[Tensor, "n D"], Head]:
    """States of a micro-batch that predict the tokens in the mask, and the head that reads them.

    Args:
        rows: of the padded batch; `mask` is theirs.
        with_graph: record the forward for a backward, whatever the caller's mode.
        first_column: see `trim`.
    """
    # Columns after the last token in the mask cannot change the states before it: attention is causal.
    part = trim({name: batch[name][rows] for name in SEQUENCE}, mask, first_column)
    with torch.set_grad_enabled(with_graph):
        hidden, head = forward(model, part)
        return hidden[mask[part.rows, : part.num_completion]], head


def states_at(
    forward: Forward, model: Any, batch: Mapping[str, Tensor], positions: Positions, size: int
) -> Iterator[tuple[Float[Tensor, "n D"], Head]]:
    """`states_of` for one micro-batch of `size` rows after the other, without gradient."""
    for rows, mask in micro_batches(positions, size):
        yield states_of(forward, model, batch, rows, mask)
