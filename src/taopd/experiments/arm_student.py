"""The student of an arm: how its weights are loaded, and the adapter that trains in their place.

A study takes the settings of `trl.ModelConfig` beside those of the training, as `taopd train` does.
"""

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config

from taopd.errors import ConfigError, TaopdError
from taopd.experiments.arm_settings import Arm
from taopd.models.adapter_folder import adapter_config, adapter_folder, base_of
from taopd.models.damage import other_kind
from taopd.models.gguf import gguf_file
from taopd.models.load_options import current_names, safe_options
from taopd.models.loading import load_config
from taopd.models.prompts import load_model
from taopd.models.quantization import require_package
from taopd.trainer.build.named_optimizer import check_optim, check_schedule
from taopd.trainer.build.named_trackers import check_trackers
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.adapter_targets import read_targets
from taopd.trainer.settings.config_checks import check_generation_batch
from taopd.trainer.settings.number_checks import (
    LORA,
    check_adapter_is_asked_for,
    check_ranges,
)
from taopd.trainer.settings.setting_types import fits, type_words
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

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
    read_targets(weights)
    training = {name: value for name, value in settings.items() if name not in hints}
    shared = {name: own[name] for name in _SHARED if name in own}
    if shared:
        key = "teacher_model_init_kwargs"
        training[key] = shared | (training.get(key) or {})
    return training, weights


def student_options(weights: ModelConfig, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the student is loaded; its own keywords, `model_init_kwargs`, win over the settings."""
    shared = {"dtype": weights.dtype, "attn_implementation": weights.attn_implementation}
    return shared | current_names(own)


def load_student(path: str, weights: ModelConfig, own: Mapping[str, Any] | None = None) -> Any:
    """The student in the precision of the settings, float32 by default."""
    options = student_options(weights, own)
    quantization = get_quantization_config(weights)
    if quantization is not None:
        options["quantization_config"] = quantization
    return load_model(path, **options)


def check_arm(run: Arm) -> None:
    """Refuse, before any arm runs, what the settings and the configs of both models tell of an arm.

    The models are made without memory for their weights, and the adapter is put into the student.

    Raises:
        ConfigError: names the arm.
    """
    try:
        training, weights = split_settings(run.config)
        args = TeachabilityConfig(
            output_dir="unused", **{**training, "use_cpu": True, "report_to": "none"}
        )
        check_generation_batch(
            args,
            args.per_device_train_batch_size * args.gradient_accumulation_steps,
            streaming=False,
        )
        if weights.load_in_4bit or weights.load_in_8bit:
            require_package(f"load_in_{'4bit' if weights.load_in_4bit else '8bit'}")
        if args.teacher_quantization:
            require_package("teacher_quantization")
        model = _skeleton(run.student, student_options(weights, args.model_init_kwargs))
        if run.teacher not in OWN_TEACHERS:
            _skeleton(run.teacher, current_names(args.teacher_model_init_kwargs))
        if weights.use_peft:
            model = _with_adapter(model, run.student, weights)
        check_schedule(args)
        check_optim(args, model)
        check_trackers(training.get("report_to"))
    except TaopdError as error:
        raise ConfigError(f"arm {run.name!r}: {error}") from error
    except (ImportError, ValueError) as error:  # how transformers and peft refuse settings
        raise ConfigError(f"arm {run.name!r}: {' '.join(str(error).split())}") from error


def _with_adapter(model: Any, student: str, weights: ModelConfig) -> Any:
    """The student with the adapter that is asked for."""
    # peft loads a network library.
    from peft import get_peft_model

    from taopd.models.adapters import check_plain, say_unmatched

    config = get_peft_config(weights)
    if adapter_config(student, {}) is not None:
        check_plain(config)
    model = get_peft_model(model, config)
    say_unmatched(model)
    return model


def _skeleton(name: str, options: Mapping[str, Any]) -> Any:
    """A model as it is loaded with these options, without its weights."""
    options = safe_options(options)
    wanted = {key: options[key] for key in ("attn_implementation", "dtype") if options.get(key)}
    if wanted.get("dtype") == "auto":
        del wanted["dtype"]
    adapter = None if gguf_file(name) else adapter_folder(name, options)
    config = load_config(name if adapter is None else base_of(adapter))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **wanted)
    except AttributeError as error:
        # Of torch, which has no such dtype.
        raise ConfigError(f"{name}: {error}") from error
    except ValueError as error:
        if words := other_kind(error):
            raise ConfigError(f"cannot load the model {name}: {words}") from error
        raise


def number_format(student: Any, args: Any) -> str:
    """The format in which an arm trains: autocast's, or else that of the student's weights."""
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else str(student.dtype).removeprefix("torch.")
