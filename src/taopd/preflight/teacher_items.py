"""The items of `taopd check` about a teacher behind a server."""

from collections.abc import Callable
from typing import Any

from taopd import preflight as look
from taopd.preflight import Measured, Verdict
from taopd.trainer.teacher import connect_teacher

UNNAMED = (
    "The teacher's files are not named: set teacher_model_name_or_path beside teacher_url. Its tokenizer and "
    "config are read, no weights."
)


def connected(subject: Any) -> Any:
    """The trainer's own teacher, or, where no trainer can be made, a connection of our own."""
    if subject.has("trainer"):
        return subject.trainer.remote_teacher
    rows = subject.student_config.get_text_config().vocab_size
    return connect_teacher(subject.settings.training, rows)


def items(subject: Any) -> list[tuple[str, Callable[[], Verdict]]]:
    """Names and calls; none without `teacher_url`."""
    if subject.settings.training.teacher_url is None:
        return []
    return [
        ("teacher server", lambda: _server(subject)),
        ("server tokens", lambda: _tokens(subject)),
    ]


def _server(subject: Any) -> Verdict:
    longest = subject.longest_prompt + (subject.settings.training.max_completion_length or 1)
    server = subject.server
    return look.check_server(server.describe(), longest=longest, context=server.context_length)


def _tokens(subject: Any) -> Verdict:
    tokenizer, options = subject.tokenizer, subject.template_options
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, **options
        )
        for prompt in subject.prompts[: look.TEXTS]["prompt"]
    ]
    return look.check_tokens(subject.server.tokenize, tokenizer, texts)


def divergence(subject: Any, measured: Measured) -> Verdict:
    """KL to the teacher, or its estimate where the teacher sends no distribution."""
    if measured.signals.reverse_kl is None:
        return look.check_sampled_divergence(measured, vocab_size=subject.trainer.vocab_size)
    return look.check_divergence(measured)
