"""Which file of a model cannot be read: looked for once reading has failed.

The libraries below say what a parser met, and neither which file it was nor that the file is cut short.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants
from safetensors import safe_open
from tokenizers import Tokenizer

from taopd.errors import root_error

AGAIN = "download or save it again"


def why(name: str, error: Exception) -> str:
    """Which file is damaged; if none is, what the library said."""
    if constants.HF_HUB_OFFLINE and not os.path.exists(name):
        return (
            f"there is no such folder here (looked in {Path.cwd()}), and HF_HUB_OFFLINE keeps the hub from "
            "being asked for what its cache lacks"
        )
    return damage(Path(name)) or other_kind(error) or root_cause(error)


def damage(model: Path) -> str:
    """Which file of a folder is damaged, or that a GGUF file is, in words; "" if none or if it is no path."""
    if model.is_file():
        files = [model]
    else:
        # A folder that a hub's client made holds links to files.
        files = sorted(file for file in model.glob("*") if file.is_file()) if model.is_dir() else []
    for file in files:
        read = _READERS.get(file.name) or _READERS.get(file.suffix.lower())
        if read is None:
            continue
        try:
            read(file)
        except Exception as error:
            size = file.stat().st_size
            words = " ".join(str(error).split())
            return f"{file} ({size} bytes) is cut short or damaged ({words}): {AGAIN}"
    return ""


def other_kind(error: Exception) -> str:
    """What transformers' refusal of an architecture or a quantization means; "" for another error."""
    if "no `quant_method`" in str(error):
        return (
            "its quantization_config names no quant_method, as MLX writes it: transformers does not read "
            "weights that are packed so; take the model in 16 bits, or serve a teacher (teacher_url)"
        )
    found = re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", str(error))
    if found is None:
        return ""
    return (
        f"{found[1]} is no causal language model to transformers (AutoModelForCausalLM), as models that read "
        "images, or text alone to encode it, are none: take a language model of that family; a teacher that "
        "reads images too can be served by vLLM or SGLang (teacher_url)"
    )


def root_cause(error: BaseException) -> str:
    """The root cause in one line; wrappers (DatasetGenerationError) say nothing themselves."""
    error = root_error(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends in a colon announces a list, and says nothing alone.
    while len(lines) > 1 and lines[0].rstrip(".").endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _read_json(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got a {type(found).__name__}")


def _read_tokenizer(file: Path) -> None:
    _read_json(file)
    Tokenizer.from_file(str(file))


def _read_safetensors(file: Path) -> None:
    with safe_open(file, framework="pt") as content:
        content.keys()


def _read_gguf(file: Path) -> None:
    from gguf import GGUFReader

    GGUFReader(file)


_NAMES = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "adapter_config")
_READERS: dict[str, Callable[[Path], None]] = {
    **{f"{name}.json": _read_json for name in (*_NAMES, "model.safetensors.index")},
    "tokenizer.json": _read_tokenizer,
    ".safetensors": _read_safetensors,
    ".gguf": _read_gguf,
}
"""By name or ending."""
