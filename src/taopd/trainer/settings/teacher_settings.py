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
        "Score with the teacher behind this URL (vLLM or SGLang), e.g. http://localhost:8000, or behind "
        "these, and load none. teacher_model_name_or_path then names its tokenizer and config only.",
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
