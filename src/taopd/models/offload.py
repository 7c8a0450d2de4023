"""A frozen model whose layers stay in host memory and come to the device one after the other.

    host      one buffer a layer, pinned where the device is a GPU
    device    two slots as large as the largest layer, while a pass runs: layer i computes in one of them, and
              layer i + 1 is copied into the other, on a GPU at the same time

Embedding, last norm and head stay on the device, because a loss over the full distribution reads the head
between the passes; so do buffers. A pass over the layers costs one copy of them, whatever the rows: larger
micro-batches hide more of it. The kernels and the bytes that they read are those of a model on the device, so
that the numbers are the same, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from taopd.errors import ConfigError

SLOTS = 2
ALIGNMENT = 256
"""Bytes that a tensor in a buffer begins at a multiple of."""


@dataclass(slots=True)
class _Slot:
    """Room for one layer on the device."""

    room: Tensor
    layer: int | None = None
    ready: Any = None
    """Event of a GPU: the copy is done."""
    left: Any = None
    """Event of a GPU: the layer that was here has computed."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """One layer's weights as one buffer in host memory."""

    buffer: Tensor
    places: list[tuple[nn.Parameter, int]]
    """Every parameter, and the byte at which it begins."""

    def point_into(self, buffer: Tensor) -> None:
        """Let the parameters read a buffer that holds the layer."""
        for parameter, start in self.places:
            size = prod(parameter.shape) * parameter.element_size()
            there = buffer[start : start + size].view(parameter.dtype)
            parameter.data = there.view(parameter.shape)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the list of modules with most of its parameters.

    Raises:
        ConfigError: it has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(weight.numel() for weight in one.parameters()) for one in lists]
    if not lists or not max(sizes):
        raise ConfigError(
            f"teacher_offload: {type(model).__name__} has no list of layers that could be moved one by one; "
            "leave it out"
        )
    return list(lists[sizes.index(max(sizes))])


class LayerOffload:
    """Moves a frozen model's layers through a device; made once, the hooks on the layers do the rest.

    Args:
        model: frozen, in host memory; what is not a layer is moved to the device here.

    Raises:
        ConfigError: see `layers_of`.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._layers = layers_of(model)
        self.copied_bytes = 0
        """To the device, so far."""
        inside = {id(weight) for layer in self._layers for weight in layer.parameters()}
        # One that is also used elsewhere stays on the device.
        outside = {id(weight) for weight in _weights_outside(model, self._layers)}
        for weight in model.parameters():
            if id(weight) in outside or id(weight) not in inside:
                weight.data = weight.data.to(self._device)
        # Small: frequencies of rotations, masks.
        for module in model.modules():
            for name, values in module.named_buffers(recurse=False):
                module._buffers[name] = values.to(self._device)
        pin = self._device.type == "cuda"
        self._packed = [_pack(layer, outside, pin=pin) for layer in self._layers]
        self._slots: list[_Slot] | None = None
        self._rests = False
        self._stream = torch.cuda.Stream(self._device) if pin else None
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(
                lambda _layer, _args, number=number: self._enter(number)
            )
            layer.register_forward_hook(
                lambda _layer, _args, _result, number=number: self._leave(number)
            )

    @property
    def slot_bytes(self) -> int:
        """What a pass takes on the device beside the weights that stay there."""
        return SLOTS * max(packed.buffer.numel() for packed in self._packed)

    @property
    def layer_bytes(self) -> int:
        """All layers together: what one pass copies."""
        return sum(packed.buffer.numel() for packed in self._packed)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All layers on the device in the block, and none of them moves."""
        self._rests = True
        try:
            for packed in self._packed:
                packed.point_into(packed.buffer.to(self._device))
            yield
        finally:
            for packed in self._packed:
                packed.point_into(packed.buffer)
            self._rests = False

    def _enter(self, number: int) -> None:
        if self._rests:
            return
        if self._slots is None:
            size = self.slot_bytes // SLOTS
            self._slots = [
                _Slot(torch.empty(size, dtype=torch.uint8, device=self._device))
                for _ in range(SLOTS)
            ]
            if self._stream is not None:
                # The memory may have been someone else's a moment ago.
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
        slot = self._slots[number % SLOTS]
        # The first of a pass, or another order than the list's: nobody has fetched it.
        if slot.layer != number:
            self._copy(number)
        if slot.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
        self._packed[number].point_into(slot.room)
        # On a GPU this returns at once, and the copy runs beside the layer's computation.
        if number + 1 < len(self._layers):
            self._copy(number + 1)

    def _leave(self, number: int) -> None:
        if self._rests:
            return
        assert self._slots is not None
        self._packed[number].point_into(self._packed[number].buffer)
        slot = self._slots[number % SLOTS]
        slot.layer = None
        if self._stream is not None:
            slot.left = torch.cuda.current_stream(self._device).record_event()
        if number + 1 == len(self._layers):
            # Nothing of the layers is on the device between two passes.
            self._slots = None

    def _copy(self, number: int) -> None:
        assert self._slots is not None
        slot, buffer = self._slots[number % SLOTS], self._packed[number].buffer
        slot.layer = number
        self.copied_bytes += buffer.numel()
        with torch.cuda.stream(self._stream):  # None: on a CPU, where this does nothing
            if self._stream is not None and slot.left is not None:
                self._stream.wait_event(slot.left)
            slot.room[: buffer.numel()].copy_(buffer, non_blocking=True)
            slot.ready = None if self._stream is None else self._stream.record_event()


def _weights_outside(model: nn.Module, layers: list[nn.Module]) -> list[nn.Parameter]:
    """Parameters that a module outside the layers holds."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [
        weight
        for module in model.modules()
        if id(module) not in inside
        for weight in module.parameters(recurse=False)
    ]


def _pack(layer: nn.Module, outside: set[int], *, pin: bool) -> _Packed:
    # One buffer a layer, because many small copies do not fill the bus.
    weights = [weight for weight in layer.parameters() if id(weight) not in outside]
    places, end = [], 0
    for weight in weights:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        places.append((weight, start))
        end = start + weight.numel() * weight.element_size()
    # Rounded up, so that a view of the last weight never ends beyond the buffer.
    buffer = torch.empty(-(-end // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8, pin_memory=pin)
    packed = _Packed(buffer, places)
    old = [weight.data for weight in weights]
    packed.point_into(buffer)
    for weight, values in zip(weights, old, strict=True):
        weight.data.copy_(values)
    return packed
