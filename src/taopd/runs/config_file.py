"""The settings file of `taopd train`, `check` and `plan`: YAML, JSON, or a run's own `config.json`."""

from pathlib import Path
from typing import Any

from taopd.errors import ConfigError
from taopd.runs.redaction import HIDDEN
from taopd.runs.validation import read_yaml


def read_config(path: str | Path) -> dict[str, Any]:
    """Settings by name; of a run's `config.json` those that were given, and its folder.

    Raises:
        ConfigError: as `read_yaml`; a `config.json` of another command, or one with a masked secret.
    """
    found = read_yaml(path, "the config file")
    if "command" not in found:  # it is no setting
        return found
    given = found.get("changed")
    if found["command"] != "train" or not isinstance(given, dict):
        raise ConfigError(
            f"{path} is of `taopd {found['command']}`, and holds no settings of a training run: give the "
            "file that it was started with"
        )
    masked = next((name for name, value in given.items() if HIDDEN in str(value)), None)
    if masked is not None:
        raise ConfigError(
            f"{path} has {masked} without its secret, which no run writes down: copy what stands under "
            "'changed' to a YAML file, with the secret in its place"
        )
    return {"output_dir": found["output_dir"]} | given if "output_dir" in found else given
