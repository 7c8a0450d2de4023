"""A teacher behind a server, from the settings: its connection, and the ids it shares with the student."""

import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.models.loading import load_config, load_tokenizer
from taopd.models.output_head import head_rows
from taopd.models.tokenizers import shared_vocabulary
from taopd.teachers import ServerTeacher, TeacherPool, connect, connect_all
from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)


def connect_teacher(args: TeachabilityConfig, vocab_size: int) -> ServerTeacher | TeacherPool:
    """The teacher at `args.teacher_url`, one address or several; see `connect` and `TeacherPool`."""
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "top_k": args.score_top_k,
        "kind": args.teacher_server,
        "concurrency": args.teacher_concurrency,
        "timeout_s": args.teacher_timeout_s,
        "patience_s": args.teacher_patience_s,
        "model": args.teacher_model_name_or_path,
    }
    urls = args.teacher_url
    assert urls is not None
    return connect(urls, **options) if isinstance(urls, str) else connect_all(urls, **options)


def own_vocabulary(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids of a student's head that its tokenizer has: behind them is padding."""
    rows = head_rows(student.config)
    return shared_vocabulary(tokenizer, tokenizer, rows, rows)


def vocabularies(
    args: TeachabilityConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """(ids that both share, ids that the teacher knows)."""
    own = head_rows(student.config)
    name = args.teacher_model_name_or_path
    if name is None:
        logger.warning(
            "the tokenizers are not compared: teacher_model_name_or_path could name the teacher's"
        )
        return own_vocabulary(student, tokenizer), own
    revision = args.teacher_model_revision or "main"
    known = head_rows(load_config(name, revision=revision))
    shared = shared_vocabulary(
        tokenizer,
        load_tokenizer(name, revision=revision),
        own,
        known,
        cut_renamed_control_tokens=args.cut_renamed_control_tokens,
    )
    return shared, known
