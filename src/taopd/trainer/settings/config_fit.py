"""Settings of a teacher that does not fit as it is, and of the tools that the student may call."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from taopd.errors import ConfigError, require_known
from taopd.models.quantization import QUANTIZATIONS
from taopd.trainer.settings.teacher_names import OWN_TEACHERS
from taopd.trainer.settings.teacher_settings import option

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

OFFLOADS = ("cpu",)


@dataclass
class FitSettings:
    """A part of `TeachabilityConfig`."""

    # A teacher that does not fit as it is, and tools

    teacher_quantization: str | None = option(
        None,
        "Hold the teacher's linear layers in 8bit or 4bit (needs bitsandbytes). `taopd check` measures what "
        "it changes. TRL's load_in_4bit is about the student.",
    )
    teacher_offload: str | None = option(
        None,
        "cpu: the teacher's layers stay in host memory and are copied to the device while each computes; "
        "same numbers. Embedding and head stay on the device.",
    )
    tools: str | None = option(
        None,
        "Dotted path of a list of functions that the student may call while it samples, "
        "package.module:TOOLS; as the trainer's argument `tools`.",
    )


def check_fit(config: "TeachabilityConfig") -> None:
    """Refuse what does not go together."""
    quantization, offload = config.teacher_quantization, config.teacher_offload
    if quantization is not None:
        require_known("teacher_quantization", quantization, QUANTIZATIONS)
    if offload is not None:
        require_known("teacher_offload", offload, OFFLOADS)
    if quantization and offload:
        raise ConfigError(
            "teacher_quantization and teacher_offload: one of them; packed weights are not moved layer by "
            "layer"
        )
    given = config.teacher_model_init_kwargs
    if quantization and isinstance(given, dict) and "quantization_config" in given:
        raise ConfigError(
            "teacher_quantization and a quantization_config in teacher_model_init_kwargs: keep one of them"
        )
    for name, value in (("quantization", quantization), ("offload", offload)):
        if value and config.teacher_model_name_or_path in OWN_TEACHERS:
            raise ConfigError(
                f"teacher_{name} is about another model: the student is its own teacher; leave it out"
            )
        if value and config.teacher_url is not None:
            raise ConfigError(
                f"teacher_{name} is about a teacher in this process: with teacher_url it is the server's to "
                "set; leave it out"
            )
