"""Full tensors of sharded parameters (FSDP2, DeepSpeed ZeRO-3).

Both gather a module's weights around that module's forward. Three uses here are outside of it: the output
head is read without being called, the reference is a copy of the student, and the teacher has no optimizer.
DeepSpeed is not imported unless it holds the weights.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(weight: Tensor) -> bool:
    """Whether ZeRO-3 shards this weight."""
    return hasattr(weight, "ds_id")


def gathered(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Context with full ZeRO-3 weights on every process; a collective: all processes must enter it."""
    sharded = [weight for weight in weights if is_sharded(weight)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a sharded one, with its gradient; a collective: all processes must call it.

    Under ZeRO-3, within a model's forward, it is the weight itself: DeepSpeed gathers external parameters
    that a forward reads, and gathers them again for the backward. Elsewhere, and without gradient, it is a
    copy.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if not is_sharded(value):
        return value
    if value.numel() == 0:
        with gathered([value]):
            return value.detach().clone()
    return value if torch.is_grad_enabled() else value.detach().clone()


def shards_frozen(accelerator: Accelerator) -> bool:
    """Whether a frozen model is held in parts: ZeRO-3."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def prepare_frozen(accelerator: Accelerator, model: nn.Module, *, move: bool = True) -> Any:
    """A frozen model on this device; under ZeRO-3 sharded as the student is.

    Args:
        move: False leaves its weights where they are.
    """
    if not shards_frozen(accelerator):
        place = None if move else False
        return accelerator.prepare_model(model, device_placement=place, evaluation_mode=True)
    import deepspeed

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    names = ("train_micro_batch_size_per_gpu", "bf16", "fp16")
    config = {name: settings[name] for name in names if name in settings}
    engine, *_ = deepspeed.initialize(
        model=model, config=config | {"zero_optimization": {"stage": 3}}
    )
    engine.eval()
    return engine
