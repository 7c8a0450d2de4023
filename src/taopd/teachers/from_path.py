"""Loading of a teacher model and its shared vocabulary with the student."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.models.loading import load_model, load_tokenizer
from taopd.models.tokenizers import shared_vocabulary


def load_teacher(
    teacher: str | PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    cut_renamed_control_tokens: bool = False,
) -> tuple[PreTrainedModel, int]:
    """The frozen teacher, and how many ids it shares with the student.

    Args:
        teacher: a path or hub id, loaded with `init_kwargs` (dtype float32 unless said, as TRL does),
            or a model, which is taken to use the student's tokenizer.
        tokenizer: the student's.
        cut_renamed_control_tokens: see `taopd.models.tokenizers.check_same_tokenizer`.

    Raises:
        DataError: if the teacher cannot be loaded, or the tokenizers give one id to two different tokens
            (names the first).
    """
    teacher_tokenizer = tokenizer
    if isinstance(teacher, str):
        kwargs = {"dtype": "float32", "revision": revision or "main"} | (init_kwargs or {})
        teacher_tokenizer = load_tokenizer(teacher, revision=kwargs["revision"])
        teacher = load_model(teacher, **kwargs)
    vocab_size = shared_vocabulary(
        tokenizer,
        teacher_tokenizer,
        student.config.get_text_config().vocab_size,
        teacher.config.get_text_config().vocab_size,
        cut_renamed_control_tokens=cut_renamed_control_tokens,
    )
    return teacher.requires_grad_(False), vocab_size
