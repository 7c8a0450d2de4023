"""Which modules an adapter is put on, as they were written: names, or one pattern over whole names.

TRL makes a list of one name a text, and peft reads a text as a regular expression over whole names, which one
name never is.
"""

import re
from typing import Any

from taopd.errors import ConfigError

_NAME = re.compile(r"[\w.]+")
_PATTERN_OF_PEFT = "all-linear"


def read_targets(model: Any) -> None:
    """Make one name of `lora_target_modules` a list again."""
    targets = model.lora_target_modules
    if not isinstance(targets, str) or targets == _PATTERN_OF_PEFT:
        return
    if _NAME.fullmatch(targets):
        model.lora_target_modules = [targets]
        return
    try:
        re.compile(targets)
    except re.error as error:
        raise ConfigError(
            f"lora_target_modules={targets!r} is no regular expression ({error}): give one over whole names "
            "of modules, or a list of names"
        ) from error
