"""`TeacherSettings`: the part of `TeachabilityConfig` that says who the teacher is and what it reads."""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A dataclass field with the default and the text that `--help-all` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class TeacherSettings:
    """Settings of the teacher; `teacher_model_name_or_path` and its options are TRL's."""

    # The teacher: what it reads, and who it is

    teacher_prompt_template: str | None = option(
        None,
        "The teacher's own prompt: text with {column} of the dataset in it, {prompt} for the student's. Of "
        "messages it fills the last user turn. None: the column teacher_prompt, if there is one.",
    )
    teacher_ema_decay: float = option(
        0.99,
        "teacher_model_name_or_path: self_ema. Share of the average that stays at each optimizer step, "
        "[0, 1).",
    )

    # The teacher behind a server

    teacher_url: list[str] | str | None = option(
        None,
        "Score with the teacher behind this URL (vLLM or SGLang), e.g. http://localhost:8000, and load none. "
        "A list: several servers of one model. teacher_model_name_or_path then names its tokenizer and "
        "config only.",
    )
    teacher_server: str = option("auto", "What answers at teacher_url: vllm, sglang, or auto.")
    teacher_concurrency: int = option(32, "Requests to teacher_url in flight at most, per process.")
    teacher_timeout_s: float = option(120.0, "Seconds for one request to teacher_url.")
    teacher_patience_s: float = option(
        600.0,
        "Seconds to wait for a server that does not answer; then the run stops with a checkpoint from which "
        "--resume continues.",
    )

    # A teacher with another tokenizer

    cut_renamed_control_tokens: bool = option(
        False,
        "Accept tokenizers that differ only in the names of control tokens (R1-Distill and Qwen2.5): the "
        "ids from the first of them on are not shared and never train.",
    )

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

    # Several teachers

    teachers: dict[str, Any] | str | None = option(
        None,
        "Several teachers by name, in place of teacher_model_name_or_path and teacher_url: "
        "{math: {model: ...}, code: {url: ...}}. A dataset column says which one a prompt has.",
    )
    teacher_column: str = option(
        "teacher", "Several teachers: the dataset's column with the name of a prompt's teacher."
    )
    teacher_weights: dict[str, Any] | str | None = option(
        None,
        "Several teachers: factors on the loss of the rows of each, {code: 0.5}; 1 where a name is left out. "
        "The denominator stays as it is.",
    )
