"""Where the files of an adapter lie, and which base it names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from taopd.errors import DataError
from taopd.runs.validation import TEXT, read_document

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_THE_HUB = (
    *(
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
    ),
)
"""Options that say where the files of a name lie."""


def adapter_folder(name: str, options: Mapping[str, Any]) -> Path | None:
    """The folder with an adapter's files, in the hub's cache for a name of the hub; None: no adapter.

    Raises:
        DataError: a folder with an adapter and a whole model, or an adapter on the hub without safetensors.
    """
    if os.path.exists(name):
        folder = Path(name)
        if not (folder / CONFIG).is_file():
            return None
        if whole := next(folder.glob("model*.safetensors*"), None):
            raise DataError(
                f"{folder} holds a whole model, {whole.name}, and an adapter, {CONFIG}: leave one of the "
                "two there"
            )
        return folder
    hub = {key: options[key] for key in _OF_THE_HUB if key in options}
    config = find_adapter_config_file(name, **hub)
    if config is None:
        return None
    if cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub) is None:
        raise DataError(
            f"the adapter {name} has no {WEIGHTS}; pickles (.bin, .pt) are never read, save it again with "
            "safetensors"
        )
    return Path(config).parent


def base_of(folder: Path) -> str:
    """Name or path of the model below the adapter in a folder."""
    document = read_document(folder / CONFIG, {"base_model_name_or_path": TEXT})
    return str(document["base_model_name_or_path"])


def of_base(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options with which an adapter's base is loaded: on the hub a revision is that of the adapter."""
    own = () if os.path.exists(name) else ("revision", "subfolder")
    return {key: value for key, value in options.items() if key not in own}
