"""Weights as they were loaded: all of the model's, no others, and in one dtype.

transformers fills what is missing with random numbers, and leaves out what it has no place for. Of both it
tells in a table that scrolls by.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from taopd.distributed.sharding import is_sharded
from taopd.errors import DataError
from taopd.runs.validation import ANY, read_document


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
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    others = [] if any_shape else sorted(report["mismatched_keys"])
    left = [] if _unpacked_by_loader(model) else left_out(model, unknown)
    # Beside packed weights stand scales and the like.
    beside = [tensor for tensor in left or unknown if not tensor.endswith((".weight", ".bias"))]
    if beside and (missing or others or left) and (packing := _packing(model, left)):
        more = f" and {len(beside) - 1} like it" if beside[1:] else ""
        raise DataError(
            f"the weights of {name} hold {beside[0]}{more}: they are packed by {packing} in a form that "
            "transformers does not read; take the model in 16 bits, or serve a teacher (teacher_url)"
        )
    if others:
        weight, held, expected = others[0]
        raise DataError(
            f"the weights of {name} do not fit its config: {weight} is {list(held)} and must be "
            f"{list(expected)}{f', as are {len(others) - 1} others' if others[1:] else ''}; take config and "
            "weights of one model"
        )
    if missing:
        instead = f", and {len(unknown)} have unknown names, first {unknown[0]}" if unknown else ""
        raise DataError(
            f"the weights of {name} are incomplete: {len(missing)} tensors are missing, first "
            f"{missing[0]}{instead}; save or download the checkpoint again"
        )
    if left:
        more = f" and {len(left) - 1} like it" if left[1:] else ""
        raise DataError(
            f"the weights of {name} hold {left[0]}{more}, which a {type(model).__name__} of its config "
            "leaves out: its numbers would be wrong. Take config and weights of one model"
        )


def _unpacked_by_loader(model: PreTrainedModel) -> bool:
    """Whether transformers knows how the checkpoint is packed, and so what tensors stand beside weights."""
    # A model that is quantized as it is loaded is read from plain weights.
    quantizer = getattr(model, "hf_quantizer", None)
    return getattr(model, "is_quantized", False) and getattr(quantizer, "pre_quantized", True)


def _packing(model: PreTrainedModel, left: Iterable[str]) -> str:
    """The quantization that a checkpoint's files name or its scales are a sign of; "" for neither."""
    folder = Path(model.name_or_path)
    # The config of a model that is quantized as it is loaded names that quantization.
    about = {} if getattr(model, "is_quantized", False) else model.config.to_dict()
    # The second file is ModelOpt's.
    for file in (folder / "config.json", folder / "hf_quant_config.json"):
        about |= read_document(file, {...: ANY}) if file.is_file() else {}

    def part(name: str) -> dict[str, Any]:
        return value if isinstance(value := about.get(name), dict) else {}

    told = part("quantization_config") or part("quantization")
    if not told and not any("scale" in tensor.rpartition(".")[2] for tensor in left):
        return ""
    method = told.get("quant_method") or part("producer").get("name")
    kind = told.get("quant_algo") or ("bits" in told and f"{told['bits']} bits")
    return f"{method or 'a quantization that no config names'}{f' ({kind})' if kind else ''}"


def left_out(model: PreTrainedModel, unknown: Iterable[str]) -> list[str]:
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
    """Cast what was unpacked (FP8 on a CPU) to the dtypes in which a checkpoint in 16 bits is loaded."""
    wanted = model.config.dtype
    if getattr(model, "is_quantized", False) or not isinstance(wanted, torch.dtype):
        return
    if all(weight.dtype == wanted or is_sharded(weight) for weight in model.parameters()):
        return
    # Families keep some weights in float32, on purpose. transformers knows which, and says it by loading.
    plain, _ = as_loaded(model, model.state_dict(), wanted)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(plain.get_parameter(name).dtype)


def as_loaded(
    model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Any, Mapping[str, Any]]:
    """What transformers makes of a model's config and of weights with these names, without any numbers.

    Returns:
        The model on `meta`, and the report of `output_loading_info`.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict={name: value.to("meta") for name, value in state.items()},
            dtype=dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
