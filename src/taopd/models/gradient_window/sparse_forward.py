"""A student's backbone run with gradient through few positions, over a constant key/value prefix.

    prefix pass   all positions, no gradient: every layer's keys and values, the last hidden states
    sparse pass   the active positions only, packed in one row: embeddings, layers, norm, with gradient;
                  attention as in `attention.py`

so that forward values equal the full forward's to rounding, and a step costs 2 + 6 s units per token of
backbone where the full forward and backward cost 6 (s: the share of positions that carry gradient).

Works on any transformers backbone whose only mixing of positions is causal attention called through
transformers' attention interface; no modelling code is copied. For the sparse pass the implementation named
in the config (sdpa, eager, flash) is exchanged for ours and put back after; with gradient checkpointing a
layer is recomputed under the same exchange. Backbones that mix positions by other means (state spaces,
convolutions, linear or chunked attention, shared key/value layers) are refused by name, and, because a list
of names is never complete, every sparse pass is compared with the prefix pass at the wanted positions: a
difference beyond rounding is an error.

Why not a `Cache` that scatters fresh keys into the stored ones: layers drop their cache under gradient
checkpointing, masks differ per model family, and sdpa keeps repeated keys of the whole length per layer.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.models.gradient_window.attention import IMPLEMENTATION, WindowState, window_state
from taopd.models.gradient_window.positions import Layout, gradient_positions
from taopd.models.gradient_window.prefix import KeyValuePrefix, backbone_of, capture_prefix

# Well above rounding, and well below what a wrong key or position gives.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
HALF_TOLERANCE = 0.1
"""Relative difference between sparse and prefix pass, by dtype of the values, beyond which something other
than rounding is at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseStates:
    """Last hidden states at the wanted positions, and what they cost."""

    hidden: Float[Tensor, "n D"]
    """In the order (row, column) of the wanted mask."""
    gradient_tokens: int
    """Positions that carry gradient."""
    valid_tokens: int

    @property
    def share(self) -> float:
        """Share of the micro-batch's valid positions that carry gradient."""
        return self.gradient_tokens / max(1, self.valid_tokens)


@contextmanager
def _exchanged(configs: list[Any], state: WindowState) -> Iterator[None]:
    """Our attention in place of the configured one."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = IMPLEMENTATION
    try:
        with window_state(state):
            yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextmanager
def _window_attention_in(backbone: Any, state: WindowState) -> Iterator[None]:
    """Run the backbone with our attention, its recomputed layers in the backward included."""
    found = {
        id(module.config): module.config
        for module in backbone.modules()
        if hasattr(module, "config")
    }
    # Attention layers read the name from the config that they hold, which may be a copy per layer.
    configs = [config for config in found.values() if hasattr(config, "_attn_implementation")]
    layers = [
        (layer, layer._gradient_checkpointing_func)
        for layer in backbone.modules()
        if getattr(layer, "gradient_checkpointing", False)
        and hasattr(layer, "_gradient_checkpointing_func")
    ]

    # Checkpointed layers run again in the backward, when the block below has been left.
    def recomputed(checkpoint: Callable, function: Callable, *args: Any) -> Any:
        @wraps(function, updated=())
        def exchanged(*inputs: Any) -> Any:
            with _exchanged(configs, state):
                return function(*inputs)

        return checkpoint(exchanged, *args)

    with ExitStack() as stack:
        stack.enter_context(_exchanged(configs, state))
        for layer, checkpoint in layers:
            layer._gradient_checkpointing_func = partial(recomputed, checkpoint)
            stack.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
        yield


def sparse_states(
    model: Any,
    input_ids: Int[Tensor, "b L"],
    attention_mask: Int[Tensor, "b L"],
    wanted: Bool[Tensor, "b L"],
    *,
    window: int,
    prefix: KeyValuePrefix | None = None,
    check_finite: bool = True,
) -> SparseStates:
    """Last hidden states at the wanted positions, with gradient through them and the `window` before each.

    Equal to the full forward's to rounding for every window; with a window of the sequence's length so is
    the gradient. Where nothing is wanted one position still runs (every rank must run a forward) and the
    result is empty, with a valid graph.

    Args:
        model: a transformers causal model, or a PEFT wrapper of one; called within its DDP or FSDP wrapper.
        attention_mask: 0 at padding, on whichever side.
        wanted: positions whose state predicts a selected token.
        window: 0 or more positions.
        prefix: of these very rows and columns, from the weights as they are now; None: computed here.
        check_finite: False: leave NaN to the loss, which names the token.

    Raises:
        ConfigError: if the backbone is not supported; `window` is negative; the result differs from the
            prefix pass beyond rounding.
        ShapeError: if the prefix is of other rows or columns.
        NumericsError: NaN or infinite states, with `check_finite`.
    """
    if window < 0:
        raise ConfigError(f"gradient_window={window}: must be 0 or more positions")
    if prefix is None:
        prefix = capture_prefix(model, input_ids, attention_mask)
    if prefix.hidden.shape[:2] != input_ids.shape:
        raise ShapeError(
            f"the prefix covers {tuple(prefix.hidden.shape[:2])} positions, the input has "
            f"{tuple(input_ids.shape)}"
        )
    valid = attention_mask.bool()
    active = gradient_positions(wanted, valid, window)
    # Every rank must run a forward: the others' collectives wait for it.
    if not bool(active.any()):
        active = torch.zeros_like(active)
        active[0, -1] = True
    layout = Layout.of(active, valid)
    backbone = backbone_of(model)
    state = WindowState(layout=layout, keys=prefix.keys, values=prefix.values)
    with _window_attention_in(backbone, state), _attention_met(backbone, state):
        hidden = backbone(
            input_ids=input_ids[layout.row, layout.column][None],
            position_ids=prefix.positions[layout.row, layout.column][None],
            use_cache=False,
        ).last_hidden_state[0]
    hidden = hidden[wanted[layout.row, layout.column]]
    _check_values(backbone, hidden.detach(), prefix, wanted, check_finite)
    return SparseStates(
        hidden=hidden,
        gradient_tokens=int(active.sum()) if bool(wanted.any()) else 0,
        valid_tokens=layout.num_valid,
    )


@contextmanager
def _attention_met(backbone: Any, state: WindowState) -> Iterator[None]:
    """Refuse a backbone whose attention is not called through transformers' interface: it fails in code of
    its own, which finds no mask, or attends to the packed row as if it were a text."""
    refusal = ConfigError(
        f"gradient_window: {type(backbone).__name__} has attention of its own, which cannot be exchanged: "
        "set gradient_window to none"
    )
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        if state.called:
            raise
        raise refusal from error
    if not state.called:
        raise refusal


def _check_values(
    backbone: Any, found: Tensor, prefix: KeyValuePrefix, wanted: Tensor, check_finite: bool
) -> None:
    """The guard of this file: the sparse pass must reproduce the prefix pass."""
    if any(
        isinstance(layer, nn.Dropout) and layer.p > 0 and layer.training
        for layer in backbone.modules()
    ):
        return  # Two passes drop different units, as two tokens do in one pass.
    expected = prefix.hidden[wanted].double()
    difference = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    name = type(backbone).__name__
    # A comparison with NaN is false: without this line a NaN would pass for a good result.
    if not math.isfinite(difference):
        if check_finite:
            raise NumericsError(f"{name}: NaN or infinite hidden states at positions that train")
        return
    if difference > TOLERANCE.get(prefix.values[0].dtype, HALF_TOLERANCE):
        raise ConfigError(
            f"gradient_window: {name}'s hidden states differ by {difference:.1e} (relative) from those of a "
            "full forward: it has dropout or jitter (set it to 0 in its config), or mixes positions in a way "
            "that is not supported (set gradient_window to none), or the prefix is of other weights"
        )
