"""Tensors that processes hold in parts (FSDP2, DeepSpeed ZeRO-3), whole where formulas need them.

Why: both gather a module's weights around that module's forward. Ours reads the output head without calling
it, copies the student before training, and runs a teacher that no optimizer knows. DeepSpeed is not imported
unless it holds the weights.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def in_parts(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds this weight."""
    return hasattr(weight, "ds_id")


def gathered(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Whole weights inside the block, on every process; all must enter it."""
    parts = [weight for weight in weights if in_parts(weight)]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)


def whole(value: Tensor) -> Tensor:
    """The whole tensor, with its gradient; all processes must ask.

    Of ZeRO-3, within a model's forward, that is the weight itself: DeepSpeed notices that a forward reads
    what is not its own, and puts it together again for the backward. Elsewhere, and without gradient, it is
    a copy.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if not in_parts(value):
        return value
    if value.numel() == 0:
        with gathered([value]):
            return value.detach().clone()
    return value if torch.is_grad_enabled() else value.detach().clone()


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> Any:
    """A model that is never trained, on this device; under ZeRO-3 in parts, as the student is."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return accelerator.prepare_model(model, evaluation_mode=True)
    import deepspeed

    settings = plugin.deepspeed_config
    names = ("train_micro_batch_size_per_gpu", "bf16", "fp16")
    config = {name: settings[name] for name in names if name in settings}
    engine, *_ = deepspeed.initialize(
        model=model, config=config | {"zero_optimization": {"stage": 3}}
    )
    engine.eval()
    return engine
