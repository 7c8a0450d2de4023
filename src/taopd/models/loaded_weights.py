"""Weights as they were loaded: all of the model's, no others, and in one dtype.

transformers fills what is missing with random numbers, and leaves out what it has no place for. Of both it
tells in a table that scrolls by.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from taopd.errors import DataError


def check_weights(
    name: str, model: PreTrainedModel, report: Mapping[str, Any], *, any_shape: bool
) -> None:
    """Refuse a model whose weights are not those that its config asks for.

    Args:
        report: of `from_pretrained`.
        any_shape: tensors of another shape were asked for.

    Raises:
        DataError: names the first tensor.
    """
    if not any_shape and (others := sorted(report["mismatched_keys"])):
        weight, held, expected = others[0]
        raise DataError(
            f"the weights of {name} do not fit its config: {weight} is {list(held)} and must be "
            f"{list(expected)}{f', as are {len(others) - 1} others' if others[1:] else ''}; take config and "
            "weights of one model"
        )
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        instead = f", and {len(unknown)} have unknown names, first {unknown[0]}" if unknown else ""
        raise DataError(
            f"the weights of {name} are incomplete: {len(missing)} tensors are missing, first "
            f"{missing[0]}{instead}; save or download the checkpoint again"
        )
    # Packed weights have tensors of their own, which their loader knows.
    if not getattr(model, "is_quantized", False) and (left := _left_out(model, unknown)):
        more = f" and {len(left) - 1} like it" if left[1:] else ""
        raise DataError(
            f"the weights of {name} hold {left[0]}{more}, which a {type(model).__name__} of its config "
            "leaves out: its numbers would be wrong. Take config and weights of one model. Scales beside "
            "weights are of a quantization that transformers does not read: take the model in 16 bits, or "
            "serve a teacher (teacher_url)"
        )


def _left_out(model: PreTrainedModel, unknown: Iterable[str]) -> list[str]:
    """Tensors of layers that the model has: a bias, a scale. What other layers hold does not concern it."""
    # A checkpoint may hold the backbone's names, without the prefix of the whole model.
    layers = {
        place
        for root in (model, model.base_model)
        for place, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    return [tensor for tensor in unknown if tensor.rpartition(".")[0] in layers]


def in_one_dtype(model: PreTrainedModel) -> None:
    """Cast what was unpacked into another 16-bit dtype than the model's (FP8 on a CPU)."""
    wanted = model.config.dtype
    if getattr(model, "is_quantized", False) or not isinstance(wanted, torch.dtype):
        return
    for weight in model.parameters():
        # Families keep some weights in float32 beside 16 bits, on purpose.
        if weight.dtype in (torch.float16, torch.bfloat16) and weight.dtype != wanted:
            weight.data = weight.data.to(wanted)
