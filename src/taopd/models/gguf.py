"""GGUF files: which file a model's name stands for, and how transformers is asked to read it.

The weights are unpacked to plain tensors, so that such a model scores, trains and saves like any other.
Packed blocks would need kernels that transformers fetches from a hub, and these are code.
"""

import importlib.util
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from taopd.errors import DataError
from taopd.runs.paths import has_any

SUFFIX = ".gguf"
PACKAGE = "gguf"
_VERSIONS = (2, 3)
"""Of the format, that are read."""
_MAGIC = b"GGUF"
_OTHER_FORMATS = "config.json", "adapter_config.json"
_STRETCHED = b"rope_freqs.weight", b"rope_factors_", b".rope.scaling.factor"
"""Of positions that are not rotated as usual: Llama 3.1, Phi's longrope, YaRN."""
_HEADER = 2**26
"""Bytes at the beginning of a file that hold at least its names."""
_ENDS = "eos", "eot", "eom"
"""The ends that a file may name: of a text, of a turn, of a message that calls a tool."""
_WHOLE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 10: 8, 11: 8}
"""Bytes of a value by the number of its type, of whole numbers."""
_FLOAT, _TEXT = 6, 8
"""Numbers of types: float32, and a length with its letters."""
_CAPS = "final_logit_softcapping", "attn_logit_softcapping"
_WINDOW, _SCALE = "attention.sliding_window", "attention.scale"
_ROTATED, _BASE = "rope.dimension_count", "rope.freq_base"
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the size (27B) whose attention is scaled by the hidden width over the heads and not by the width
of a head; llama.cpp's rule, the file says nothing."""


def gguf_file(name: str, file: str | None = None) -> Path | None:
    """The GGUF file that a model's name stands for; None where it is a folder or a hub id of another kind.

    Args:
        name: path of the file, or a folder that holds it and no config.json.
        file: which one of the folder's, the keyword `gguf_file` of `from_pretrained`.

    Raises:
        DataError: no such file, no GGUF file, or several in a folder and none is named.
    """
    path = Path(name)
    if name.lower().endswith(SUFFIX):
        found = path
    elif not os.path.isdir(name):  # also a name that no file can have
        if file is not None:
            raise DataError(f"gguf_file={file!r}: download the file of {name}, and name its path")
        return None
    elif file is not None:
        found = path / file
    else:
        files = sorted(one for one in path.iterdir() if one.suffix.lower() == SUFFIX)
        if not files or has_any(path, _OTHER_FORMATS):
            return None
        if len(files) > 1:
            raise DataError(
                f"{name} holds {len(files)} GGUF files: name one of them, as {files[0]}; a file in several "
                "parts must be joined first"
            )
        found = files[0]
    if os.path.isdir(found):
        raise DataError(f"{found} is a folder: name the GGUF file in it")
    if not os.path.isfile(found):
        raise DataError(f"no such GGUF file: {found} (looked in {Path.cwd()})")
    with open(found, "rb") as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            raise DataError(f"{found} is no GGUF file: it does not begin with {_MAGIC.decode()}")
        head = content.read(4)
        version = int.from_bytes(head, "little")
        if len(head) == 4 and version not in _VERSIONS:
            raise DataError(
                f"{found} is GGUF of version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read, "
                "in little-endian"
            )
    return found


def source(path: Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes to read a config, a tokenizer or weights from the file.

    Raises:
        DataError: the package `gguf` is missing.
    """
    # Asked for before transformers is, whose own message comes with a log line and a link.
    if importlib.util.find_spec(PACKAGE) is None:
        raise DataError(
            f"reading {path} needs the package {PACKAGE}, which is not installed: pip install --no-deps "
            f"{PACKAGE}"
        )
    return str(path.parent), {"gguf_file": path.name}


@contextmanager
def alone(path: Path) -> Iterator[str]:
    """A folder for the block that holds nothing but the file: a tokenizer beside it may be another one."""
    with TemporaryDirectory() as folder:
        os.symlink(path.resolve(), Path(folder) / path.name)
        yield folder


def unpacked() -> dict[str, Any]:
    """The option of `from_pretrained` that unpacks all weights."""
    # Before it could do otherwise, transformers had no option for it.
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def check_positions(model: PreTrainedModel, path: Path) -> None:
    """Refuse a file that stretches its positions, where transformers did not read how.

    Raises:
        DataError: the model would compute other numbers than the one that was written.
    """
    rotation = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rotation.get("rope_type", "default") != "default":
        return
    names = _header(path)
    if any(name in names for name in _STRETCHED):
        raise DataError(
            f"{path} stretches its positions (RoPE scaling), which transformers does not read from GGUF: it "
            "would be another model. Take its safetensors"
        )


def generation_config(config: PretrainedConfig, path: Path) -> GenerationConfig:
    """How the model is sampled from, by the file alone: it stops at every end that the file names.

    transformers reads the end of a text, and where the file names none takes one of the model's family.
    """
    found = GenerationConfig.from_model_config(config)
    # Of one family transformers knows more ends than the file has room for.
    more = found.eos_token_id if isinstance(found.eos_token_id, list) else []
    ends = list(dict.fromkeys([*_end_ids(path), *more]))
    found.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    return found


def completed(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """The config with what the file says and transformers does not read; it takes the family's defaults."""
    head = _header(path)
    family = _value(head, "general.architecture", path)

    def said(name: str) -> Any:
        return _value(head, f"{family}.{name}", path)

    for name in _CAPS:
        if (cap := said(name)) is not None and hasattr(config, name):
            setattr(config, name, cap or None)  # 0 is none
    if (window := said(_WINDOW)) and getattr(config, "sliding_window", 0) is None:
        config.sliding_window = window
    if config.model_type in _LARGEST_GEMMA:
        largest = config.num_hidden_layers == _LARGEST_GEMMA[config.model_type]
        scale = said(_SCALE)
        width = _head_width(config) if largest else config.head_dim
        config.query_pre_attn_scalar = round(scale**-2) if scale else width
    rotation = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rotation and (base := said(_BASE)):
        rotation["rope_theta"] = base
    if "partial_rotary_factor" in rotation and (rotated := said(_ROTATED)):
        width = getattr(config, "head_dim", None) or _head_width(config)
        rotation["partial_rotary_factor"] = rotated / width
    return config


def _head_width(config: PretrainedConfig) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def _end_ids(path: Path) -> list[int]:
    """The ids of `_ENDS` that the file names.

    Raises:
        DataError: one that is no whole number.
    """
    head, found = _header(path), []
    for end in _ENDS:
        name = f"tokenizer.ggml.{end}_token_id"
        value = _value(head, name, path)
        if not isinstance(value, int | None):
            raise DataError(f"{path}: {name} is no whole number: convert the file again")
        if value is not None and value >= 0:
            found.append(value)
    return found


def _value(head: bytes, name: str, path: Path) -> int | float | str | None:
    """A value of the file's header; None where it has none.

    Read here: the package gguf takes a minute for a vocabulary of 150,000 tokens.

    Raises:
        DataError: neither a number nor text.
    """
    # A key is its length and its letters; the number of its value's type and the value follow.
    key = len(name).to_bytes(8, "little") + name.encode()
    if (at := head.find(key)) < 0:
        return None
    at += len(key) + 4
    kind = int.from_bytes(head[at - 4 : at], "little")
    if kind == _FLOAT:
        return float(struct.unpack("<f", head[at : at + 4])[0])
    if kind == _TEXT:
        size = int.from_bytes(head[at : at + 8], "little")
        return head[at + 8 : at + 8 + size].decode(errors="replace")
    if kind not in _WHOLE:
        raise DataError(f"{path}: {name} is neither a number nor text: convert the file again")
    value = int.from_bytes(head[at : at + _WHOLE[kind]], "little")
    # The largest is -1 in the other reading, llama.cpp's "none".
    return -1 if value == 2 ** (8 * _WHOLE[kind]) - 1 else value


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEADER)


def without_added(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer without tokens that the model has no row for: transformers adds an unknown token."""
    if len(tokenizer) <= num_rows:
        return tokenizer
    # A backend forgets no token, so it is made again from its own description.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] < num_rows]
    named = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) < num_rows
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **named,
    )


def as_declared(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with the file's own tokens alone, and the ends and padding that the file names."""
    folder, more = source(path)
    declared, _ = PretrainedConfig.get_config_dict(folder, **more)
    rows = AutoConfig.for_model(**declared).get_text_config().vocab_size
    tokenizer = without_added(tokenizer, rows)
    # Before 5.18 transformers named a Llama's first token as its last, and none for other models.
    named = {name: declared.get(f"{name}_id") for name in ("bos_token", "pad_token")}
    # A tokenizer has room for one end; `generation_config` has all of them.
    named["eos_token"] = next(iter(_end_ids(path)), None)
    for name, index in named.items():
        setattr(tokenizer, name, None if index is None else tokenizer.convert_ids_to_tokens(index))
    return tokenizer


def as_plain(model: PreTrainedModel, path: Path) -> None:
    """Take away what marks an unpacked model as quantized: it could be neither trained nor saved."""
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    # The folder alone would not find tokenizer and config again.
    model.config.name_or_path = str(path)
