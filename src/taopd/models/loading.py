"""Models and tokenizers from disk or hub, with every failure turned into one clear message.

Why wrappers: the libraries below answer an unreadable folder with a dozen different exceptions, and
a checkpoint that lacks weights with a warning and random numbers. Here both are a `DataError` that
says what, where and what to do.

Remote code is never run, and weights are read from safetensors and GGUF only: no pickles.
"""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import safetensors
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from taopd.errors import DataError
from taopd.models import gguf
from taopd.models.adapter_folder import CONFIG, adapter_folder, base_of, of_base
from taopd.models.damage import why
from taopd.models.load_options import NO_PICKLES, safe_options
from taopd.models.loaded_weights import check_weights, in_one_dtype
from taopd.models.output_head import require_decoder
from taopd.models.stop_tokens import check_declared
from taopd.runs.folder import MODEL_FOLDER
from taopd.runs.paths import has_any
from taopd.runs.validation import TEXT, read_document, shown

DATASET_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
# What unreadable input raises below us: the network and files are OSError, most parsers ValueError.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    EOFError,
    TypeError,
    ImportError,
    AttributeError,
    safetensors.SafetensorError,
)
_CONNECT_S = 5.0
"""Seconds for a connection to the hub."""
VOCABULARY_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
"""Without one of them a folder holds no tokenizer, whatever its settings say."""
_TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def load_tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer padded on the left, as generation needs; a missing pad token becomes the eos
    token.

    Raises:
        DataError: missing, incomplete or unreadable, or neither a pad nor an eos token.
    """
    name, more = str(name_or_path), dict[str, Any]()
    file = gguf.gguf_file(name, kwargs.pop("gguf_file", None))
    adapter = Path(name) / CONFIG
    # os.path: a name may be too long for any file.
    if os.path.isfile(adapter) and not has_any(name, _TOKENIZER_FILES):
        # A folder of an adapter alone has its base's tokenizer.
        name = base_of(Path(name))
    if file is None:
        check_model_folder(name, "tokenizer", _TOKENIZER_FILES)
    else:
        name, more = str(file), gguf.source(file)[1]
    try:
        with nullcontext(name) if file is None else gguf.alone(file) as where:
            # Left padding puts the last prompt token next to the first sampled one.
            options = {"padding_side": "left", "truncation_side": "left"} | kwargs | more
            tokenizer = AutoTokenizer.from_pretrained(
                where, **(options | {"trust_remote_code": False})
            )
        if file is not None:
            tokenizer = gguf.as_declared(tokenizer, file)
    except Exception as error:  # the readers in Rust raise nothing narrower
        if os.path.isdir(name) and not has_any(name, VOCABULARY_FILES):
            lacks = "it has no tokenizer.json, only settings; save the tokenizer again"
            raise DataError(f"{name} is no tokenizer folder: {lacks}") from error
        raise DataError(f"cannot load a tokenizer from {name}: {why(name, error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(
                f"the tokenizer of {name} has neither a pad nor an eos token; set one and save it "
                "again"
            )
        # As TRL does; the attention mask, not the id, says what is padding.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name_or_path: str | Path, *, make: Callable[..., Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model; keyword arguments go to `from_pretrained`.

    Args:
        make: takes the place of `AutoModelForCausalLM.from_pretrained` where there is a plain model.
        name_or_path: a folder, a hub id, or a GGUF file (or a folder with one and no config.json).

    Raises:
        DataError: no such folder, no config.json, no or incomplete or unreadable weights, unknown
            architecture, or a hub that cannot be reached.
    """
    name, where = str(name_or_path), str(name_or_path)
    file = gguf.gguf_file(name, kwargs.get("gguf_file"))
    options = safe_options(kwargs)
    if file is not None:
        if options.get("quantization_config") is not None:
            raise DataError(
                f"{file}: a GGUF file is unpacked and not quantized again: leave quantization out, or take "
                "the model that it was made from"
            )
        name = str(file)
        where, more = gguf.source(file)
        options |= more | gguf.unpacked()
    else:
        check_model_folder(name)
        if Path(name).is_dir():
            _check_weights(Path(name))
            check_declared(Path(name))
        try:
            adapter = adapter_folder(name, options)
        except DataError:
            raise
        except UNREADABLE as error:
            raise DataError(f"cannot load the model {name}: {why(name, error)}") from error
        if adapter is not None:
            return _with_adapter(name, adapter, kwargs)
    # Loaded whatever the shapes are, as transformers' own message names none of them.
    fits = "ignore_mismatched_sizes" in options
    try:
        if file is not None:
            make, options["config"] = None, load_config(file)
        model, report = (make or AutoModelForCausalLM.from_pretrained)(
            where, output_loading_info=True, **({"ignore_mismatched_sizes": True} | options)
        )
    except Exception as error:  # a config's own checks raise nothing narrower
        raise DataError(f"cannot load the model {name}: {why(name, error)}") from error
    if report["missing_keys"]:
        require_decoder(f"model {name}", load_config(name))
    check_weights(name, model, report, any_shape=fits)
    in_one_dtype(model)
    if file is not None:
        gguf.check_positions(model, file)
        gguf.as_plain(model, file)
        model.generation_config = gguf.generation_config(model.config, file)
    return model


def _with_adapter(name: str, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    """The base of an adapter, checked as every model is, with the adapter in it and frozen.

    Loaded together, transformers reports on the adapter alone: what the base lacks would be random numbers.
    """
    try:
        model = load_model(base_of(folder), **of_base(options, name))
    except DataError as error:
        raise DataError(f"the base of the adapter {name}: {error}") from error
    try:
        model.load_adapter(str(folder), use_safetensors=True)
    except Exception as error:  # as above
        raise DataError(f"cannot load the adapter {name}: {why(str(folder), error)}") from error
    from taopd.models.adapters import read_adapter_again

    read_adapter_again(model, folder)
    return model


def load_config(name_or_path: str | Path, **kwargs: Any) -> PretrainedConfig:
    """The config of a folder, a hub id or a GGUF file, of an adapter that of its base; no weights are read.

    Raises:
        DataError: it cannot be read.
    """
    name, more = str(name_or_path), dict[str, Any]()
    file = gguf.gguf_file(name)
    if file is not None:
        name, more = gguf.source(file)
    try:
        if file is None and (adapter := adapter_folder(name, kwargs)) is not None:
            return load_config(base_of(adapter), **of_base(kwargs, name))
        config = AutoConfig.from_pretrained(name, **(kwargs | more | {"trust_remote_code": False}))
        return config if file is None else gguf.completed(config, file)
    except DataError:
        raise
    except Exception as error:  # a config's own checks raise nothing narrower
        cause = why(str(file or name), error)
        raise DataError(f"cannot read the config of {file or name}: {cause}") from error


def load_generation_config(name_or_path: str | Path, **kwargs: Any) -> GenerationConfig:
    """How a model is sampled from, as it is loaded with it; no weights are read.

    Raises:
        DataError: it cannot be read.
    """
    name = str(name_or_path)
    if file := gguf.gguf_file(name):
        return gguf.generation_config(load_config(file), file)
    if (adapter := adapter_folder(name, kwargs)) is not None:
        return load_generation_config(base_of(adapter), **of_base(kwargs, name))
    check_declared(Path(name))
    try:
        return GenerationConfig.from_pretrained(name, **kwargs)
    except OSError:  # it has none: what its config says
        return GenerationConfig.from_model_config(load_config(name, **kwargs))


def has_adapter(model: Any) -> bool:
    """Whether peft or transformers has put an adapter into a model."""
    return bool(getattr(model, "peft_config", None))


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path and not as a hub id."""
    if name.startswith((".", "/", "~")) or Path(name).suffix.lower() in DATASET_READERS:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:  # spaces, umlauts, two slashes, a NUL, too long
        return True
    return False


def check_hub(name: str, kind: str) -> None:
    """Refuse a name that only the hub could know, where the hub cannot be reached.

    Its client would try for most of a minute, file by file.

    Raises:
        DataError: with what was looked for where.
    """
    hub = urlsplit(constants.ENDPOINT)
    through_proxy = {"http", "https", "all"} & getproxies().keys()
    if constants.HF_HUB_OFFLINE or through_proxy or hub.hostname is None:
        return
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=_CONNECT_S).close()
    except OSError as error:
        raise DataError(
            f"no {kind} {name}: there is no such folder here (looked in {Path.cwd()}), it is not in the "
            f"hub's cache, and the hub {hub.hostname} cannot be reached ({error.strerror or error})"
        ) from error


def _check_weights(folder: Path) -> None:
    """Weights in safetensors, all of them files of this folder."""
    if not has_any(folder, _WEIGHTS):
        raise DataError(
            f"{folder} has no weights: none of {', '.join(_WEIGHTS)} is there"
            + (_inside(folder) or f"; {NO_PICKLES}")
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for shard in read_document(index, {"weight_map": {...: TEXT}})["weight_map"].values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise DataError(f"{index} names {shown(shard)}, no safetensors file of this folder")


def check_model_folder(
    name: str,
    kind: str = "model",
    one_of: tuple[str, ...] = ("config.json", "adapter_config.json"),
) -> None:
    """Refuse a name that leads to no folder with one of these files, and to no hub.

    Raises:
        DataError: names the folder, and what it is or lacks.
    """
    path = Path(name)
    if os.path.isfile(path):
        raise DataError(f"{name} is a file; a {kind} is a folder with {one_of[0]}")
    if not os.path.exists(path):  # also a name that no file can have
        if looks_local(name):
            raise DataError(f"no such {kind} folder: {name} (looked in {Path.cwd()})")
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in one_of):
            check_hub(name, kind)
        return
    if not has_any(path, one_of):
        raise DataError(f"{name} is no {kind} folder: it has no {one_of[0]}{_inside(path)}")


def _inside(path: Path) -> str:
    """Where the student is, if the folder is a run's."""
    student = path / MODEL_FOLDER
    return f"; the student of this run is {student}" if (student / "config.json").is_file() else ""
