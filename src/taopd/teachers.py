"""Loading a teacher and agreeing with the student on the ids that both know."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from taopd.vocabulary import shared_vocabulary


def load_teacher(
    teacher: str | PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, int]:
    """The frozen teacher, and how many ids it shares with the student.

    Args:
        teacher: a path or hub id, loaded with `init_kwargs`, or a model, which is taken to use the
            student's tokenizer.
        tokenizer: the student's.

    Raises:
        DataError: if the tokenizers give one id to two different tokens (names the first).
    """
    teacher_tokenizer = tokenizer
    if isinstance(teacher, str):
        kwargs = dict(init_kwargs or {})
        if revision is not None:
            kwargs.setdefault("revision", revision)
        teacher_tokenizer = AutoTokenizer.from_pretrained(teacher, revision=kwargs.get("revision"))
        teacher = create_model_from_path(teacher, **kwargs)
    vocab_size = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        student.config.get_text_config().vocab_size,
        teacher.config.get_text_config().vocab_size,
    )
    return teacher.requires_grad_(False), vocab_size
