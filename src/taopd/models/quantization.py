"""A model whose linear layers are held in 8 or 4 bits, by bitsandbytes through transformers.

    8bit    LLM.int8(): weights in int8 with a scale a row; inputs are rounded to int8 a row as well, but for
            columns of outliers, which are computed in 16 bits
    4bit    NF4: weights in 4 bits with a scale for 64 of them; the matmul is in the model's dtype

Embedding, head and norms stay as they are, and so do experts that are one tensor and no linear layer.

Why bitsandbytes: it runs on CUDA, ROCm, XPU and CPUs, and is under the MIT licence. Not torchao, whose 4 bits
have another layout for every kind of device; not quanto, which is no longer developed.

Source: arXiv 2208.07339 (LLM.int8), 2305.14314 (NF4).
"""

import importlib.util
import logging
import sys
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from taopd.errors import ConfigError

QUANTIZATIONS = ("8bit", "4bit")
PACKAGE = "bitsandbytes"
BLOCK = 64
"""Weights that share a scale in 4 bits."""
_CPU_ROWS = 32
"""Outputs of a layer that a CPU kernel for 4 bits takes at a time."""


def quantization_config(kind: str, dtype: Any) -> BitsAndBytesConfig:
    """What `from_pretrained` takes to quantize a model as it loads it.

    Args:
        kind: one of `QUANTIZATIONS`.
        dtype: of the matmuls in 4 bits, a torch dtype or its name; "auto" is bfloat16.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    require_package(f"teacher_quantization={kind!r}")
    _import_without_hub()
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype in (None, "auto") else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def require_package(setting: str) -> None:
    """Refuse a setting that needs bitsandbytes where it is not installed.

    Raises:
        ConfigError: names the setting.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{setting} needs the package {PACKAGE}, which is not installed: pip install {PACKAGE}"
        )


def _import_without_hub() -> None:
    """Import bitsandbytes; on some CPUs it would fetch a kernel from a hub, which is code."""
    # It does so through the package `kernels`, and goes on with its own where that cannot be imported.
    present = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    # It warns that this failed, and on a CPU once a layer of every pass that inputs are rounded.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        importlib.import_module(PACKAGE)
    finally:
        del sys.modules["kernels"]
        if present is not None:
            sys.modules["kernels"] = present


def quantized_kind(model: Any) -> str | None:
    """Which of `QUANTIZATIONS` a model was loaded in; None for any other."""
    for kind in QUANTIZATIONS:
        if getattr(model, f"is_loaded_in_{kind}", False):
            return kind
    return None


def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model in 4 bits whose layers the CPU's kernel cannot compute.

    Raises:
        ConfigError: names the layer and its shape.
    """
    if model.device.type != "cpu" or quantized_kind(model) != "4bit":
        return
    import bitsandbytes

    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            rows, columns = layer.out_features, layer.in_features
            if rows % _CPU_ROWS or columns % BLOCK:
                raise ConfigError(
                    f"teacher_quantization='4bit' on a CPU needs layers of multiples of {_CPU_ROWS} outputs "
                    f"and {BLOCK} inputs; {name} has {rows} and {columns}: take '8bit', or none for so "
                    "small a model"
                )
