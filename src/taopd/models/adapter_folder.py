"""Where the files of an adapter lie, and which base it names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from taopd.errors import DataError
from taopd.models.load_options import NO_PICKLES
from taopd.runs.validation import TEXT, read_document

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_THE_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Options that say where the files of a name lie."""


def adapter_config(name: str, options: Mapping[str, Any]) -> Path | None:
    """The config of the adapter in a folder, or under a name of the hub; None: no adapter."""
    if os.path.exists(name):
        file = Path(name) / CONFIG
        return file if file.is_file() else None
    found = find_adapter_config_file(name, **_hub(options))
    return None if found is None else Path(found)


def adapter_folder(name: str, options: Mapping[str, Any]) -> Path | None:
    """The folder with an adapter's files, in the hub's cache for a name of the hub; None: no adapter.

    Raises:
        DataError: a folder with an adapter and a whole model, or an adapter on the hub without safetensors.
    """
    config = adapter_config(name, options)
    if config is None:
        return None
    if os.path.exists(name):
        if whole := next(config.parent.glob("model*.safetensors*"), None):
            raise DataError(
                f"{name} holds a whole model, {whole.name}, and an adapter, {CONFIG}: leave one of the "
                "two there"
            )
    elif (
        cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False, **_hub(options))
        is None
    ):
        raise DataError(f"the adapter {name} has no {WEIGHTS}; {NO_PICKLES}")
    return config.parent


def _hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _OF_THE_HUB if key in options}


def base_of(folder: Path) -> str:
    """Name or path of the model below the adapter in a folder."""
    document = read_document(folder / CONFIG, {"base_model_name_or_path": TEXT})
    return str(document["base_model_name_or_path"])


def of_base(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options with which an adapter's base is loaded: on the hub a revision is that of the adapter."""
    own = () if os.path.exists(name) else ("revision", "subfolder")
    return {key: value for key, value in options.items() if key not in own}
