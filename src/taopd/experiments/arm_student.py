"""The student of an arm: how its weights are loaded, and the adapter that trains in their place.

A study takes the settings of `trl.ModelConfig` beside those of the training, as `taopd train` does.
"""

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from taopd.errors import ConfigError
from taopd.models.adapter_folder import adapter_config
from taopd.models.prompts import load_model
from taopd.trainer.settings.number_checks import (
    LORA,
    check_adapter_is_asked_for,
    check_ranges,
)
from taopd.trainer.settings.yaml_types import fits, type_words

_NOT_OF_AN_ARM = {"model_name_or_path", "model_revision", "trust_remote_code"}
"""The study names the student, and code of a model repository is never run."""
_SHARED = ("dtype", "attn_implementation")
"""Where they are given, the teacher is loaded likewise."""

_CHOICES: dict[str, list[str]] = {
    entry.name: entry.metadata["choices"]
    for entry in fields(ModelConfig)
    if "choices" in entry.metadata
}


def weight_hints() -> dict[str, Any]:
    """Types of the settings of `trl.ModelConfig` that a study may set, by name."""
    hints = typing.get_type_hints(ModelConfig)
    names = {entry.name for entry in fields(ModelConfig) if entry.init} - _NOT_OF_AN_ARM
    return {name: hints[name] for name in sorted(names)}


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], ModelConfig]:
    """The settings of the training, and those of the student's weights.

    Raises:
        ConfigError: a setting of the weights that has the wrong type, or is outside its range.
    """
    hints = weight_hints()
    own = {name: value for name, value in settings.items() if name in hints}
    for name, value in own.items():
        # Text becomes a number where the study is read.
        if not fits(value, hints[name]) or (hints[name] is bool and isinstance(value, str)):
            raise ConfigError(f"{name}={value!r}: must be {type_words(hints[name])}")
        choices = _CHOICES.get(name)
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{name}={value!r}: must be one of {', '.join(choices)}")
    check_adapter_is_asked_for(own)
    weights = ModelConfig(**own)
    check_ranges(weights, LORA)
    training = {name: value for name, value in settings.items() if name not in hints}
    shared = {name: own[name] for name in _SHARED if name in own}
    if shared:
        key = "teacher_model_init_kwargs"
        training[key] = shared | (training.get(key) or {})
    return training, weights


def load_student(path: str, weights: ModelConfig) -> Any:
    """The student in the precision of the settings, float32 by default."""
    options = {"dtype": weights.dtype, "attn_implementation": weights.attn_implementation}
    quantization = get_quantization_config(weights)
    if quantization is not None:
        options["quantization_config"] = quantization
    return load_model(path, **options)


def check_adapter(student: str, settings: Mapping[str, Any], where: str) -> None:
    """Refuse a new adapter that cannot be saved with the student's own one, before any arm runs.

    Raises:
        ConfigError: names the arm.
    """
    _, weights = split_settings(settings)
    if not weights.use_peft or adapter_config(student, {}) is None:
        return
    # peft loads a network library.
    from taopd.models.adapters import check_plain

    try:
        check_plain(get_peft_config(weights))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def number_format(student: Any, args: Any) -> str:
    """The format in which an arm trains: autocast's, or else that of the student's weights."""
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else str(student.dtype).removeprefix("torch.")
