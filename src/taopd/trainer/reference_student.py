"""The student as it was before training, whole or as an adapter: for anchor, guard and a teacher `self`."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import gathered, prepare_frozen
from taopd.errors import ConfigError
from taopd.kernels import Head
from taopd.models.batch import Forward, Positions
from taopd.models.forward import states_at


class ReferenceStudent:
    """The student before training: a frozen copy, or with an adapter a frozen copy of what trains.

    Args:
        student: as it is given to the trainer, before any step.

    Raises:
        ConfigError: an adapter that was trained before, under ZeRO-3.
    """

    def __init__(self, student: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.copy: Any = None
        """The prepared copy, or None where the weights that train are exchanged instead."""
        self.start: dict[str, Tensor] = {}
        """These weights before training, by name. The adapter may have been trained before: switching it off
        would give another model than the one that training began with."""
        self._head: Head | None = None
        self._switched_off = False
        if not is_peft_model(student):
            # A copy of shards would be a copy of parts: ZeRO-3 puts them together first.
            with gathered(student.parameters()):
                frozen = copy.deepcopy(student).requires_grad_(False)
            # Dropout would be part of the reference.
            self.copy = prepare_frozen(accelerator, frozen.eval())
            return
        trained = {name: w for name, w in student.named_parameters() if w.requires_grad}
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            # Its shards cannot be exchanged; a fresh LoRA changes nothing yet, and can be switched off.
            with gathered(trained.values()):
                fresh = all(not w.any() for name, w in trained.items() if "lora_A" not in name)
            if not fresh:
                raise ConfigError(
                    "under ZeRO-3 the anchor, the collapse guard and a teacher 'self' have no reference for "
                    "an adapter that was trained before: use ZeRO-2, or set method: published, "
                    "collapse_guard: off and another teacher"
                )
            self._switched_off = True
            return
        self.start = {name: weight.detach().clone() for name, weight in trained.items()}

    @torch.no_grad()
    def states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        micro_batch_size: int,
    ) -> Float[Tensor, "n D"]:
        """Hidden states that predict the tokens at the positions."""
        with self.weights(student) as reference:
            parts = list(states_at(forward, reference, batch, positions, micro_batch_size))
        return torch.cat([states for states, _ in parts])

    @torch.no_grad()
    def head(self, head_of: Callable[[Any], Head], student: Any) -> Head:
        """The reference model's head."""
        if self.copy is not None:
            return head_of(self.copy)
        inner = self._accelerator.unwrap_model(student)
        if not _trains(inner.get_output_embeddings()):
            return head_of(student)
        if self._head is None:
            # Its values are those of now once the weights are exchanged back.
            with self.weights(student):
                head = head_of(student)
                bias = None if head.bias is None else head.bias.clone()
                self._head = replace(head, weight=head.weight.clone(), bias=bias)
        return self._head

    def forget_head(self) -> None:
        """Read the head again at its next use: `start` has other values now."""
        self._head = None

    @contextmanager
    def weights(self, student: Any) -> Iterator[Any]:
        """Context of the model to run: the copy, or the student with the weights of `start`."""
        if self.copy is not None:
            yield self.copy
            return
        inner = self._accelerator.unwrap_model(student)
        weights = {name: w for name, w in inner.named_parameters() if name in self.start}
        now = {name: weight.data.clone() for name, weight in weights.items()}
        training = inner.training
        inner.eval()
        adapter = inner.disable_adapter() if self._switched_off else nullcontext()
        try:
            # `.data`: the values are back before any backward of a recorded forward reads them.
            for name, weight in weights.items():
                weight.data.copy_(_laid_out(self.start[name], weight))
            with adapter:
                yield student
        finally:
            for name, weight in weights.items():
                weight.data.copy_(now[name])
            inner.train(training)


def _trains(head: nn.Module) -> bool:
    """Whether training moves an output head: peft computes the weight of one with trainable tokens."""
    held = head.weight, getattr(head, "bias", None)
    return any(
        each is not None and (each.requires_grad or not isinstance(each, nn.Parameter))
        for each in held
    )


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor sharded as another one is."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
