"""The settings of a teacher behind a server. Part of `TeachabilityConfig`, in a file of its own."""

from dataclasses import dataclass, field
from typing import Any

from taopd.errors import ConfigError
from taopd.losses import LOSSES, needs_teacher_distribution


@dataclass
class TeacherSettings:
    """Where the teacher is, and how long it is waited for."""

    teacher_url: str | None = field(
        default=None,
        metadata={
            "help": "Score with the teacher behind this URL (vLLM or SGLang), e.g. http://localhost:8000, "
            "and load none. teacher_model_name_or_path then names its tokenizer and config only."
        },
    )
    teacher_server: str = field(
        default="auto", metadata={"help": "What answers at teacher_url: vllm, sglang, or auto."}
    )
    teacher_concurrency: int = field(
        default=32, metadata={"help": "Requests to teacher_url in flight at most, per process."}
    )
    teacher_timeout_s: float = field(
        default=120.0, metadata={"help": "Seconds for one request to teacher_url."}
    )
    teacher_patience_s: float = field(
        default=600.0,
        metadata={
            "help": "Seconds that the server may stay away; after them the run stops with a checkpoint "
            "that --resume goes on from."
        },
    )

    def check_teacher(self, asked: bool) -> None:
        """Refuse values out of range, and what only a teacher in this process can do.

        Args:
            asked: the teacher is asked for numbers, at a URL or through `Teacher`.

        Raises:
            ConfigError: names the setting and the alternatives.
        """
        for name, least in (("concurrency", 1), ("timeout_s", 1e-3), ("patience_s", 0)):
            value = getattr(self, f"teacher_{name}")
            if not value >= least:
                raise ConfigError(f"teacher_{name}={value!r}: must be at least {least:g}")
        if not asked:
            return
        args: Any = self
        if needs_teacher_distribution(args.loss):
            served = [name for name in LOSSES if not needs_teacher_distribution(name)]
            raise ConfigError(
                f"loss={args.loss!r} reads the teacher's full distribution, which no server sends: set "
                f"loss={' or '.join(map(repr, served))}, or load the teacher in this process"
            )
        if args.temperature != 1.0:
            raise ConfigError(
                f"temperature={args.temperature}: a server scores at temperature 1; set temperature=1, or "
                "load the teacher in this process"
            )
        if args.stop_tokens == "merge":
            raise ConfigError(
                "stop_tokens='merge' reads the teacher's mass on every stop id, which no server sends: set "
                "stop_tokens='exclude', or load the teacher in this process"
            )
