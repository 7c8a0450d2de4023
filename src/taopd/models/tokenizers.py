"""Which token ids mean the same to student and teacher.

What: on-policy distillation compares two distributions id by id, so id i must be the same token for
both models. `check_same_tokenizer` proves it from the two vocabularies; `shared_vocabulary` also
takes the two heads into account, which model families pad to different sizes (151,936 and 152,064
rows over 151,669 tokens). The losses and signals then cut both heads to the first n ids: a padded
row has no token and its logit is noise.

Why a prefix [0, n): heads are cut by slicing, without a gather over the vocabulary. Where one
tokenizer has a few more added tokens at its end, the prefix ends before them. An id below n that
neither tokenizer uses (a hole) stays inside: both models have a row for it, and it is said in the log.

Not compared: merges, normalizers and chat templates. The teacher reads the student's ids, never its
own encoding of the text, so only what an id means counts.
"""

import logging
from collections.abc import Collection
from functools import cache

from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError

logger = logging.getLogger(__name__)


def check_same_tokenizer(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    cut_renamed_control_tokens: bool = False,
) -> int:
    """Return n: ids 0 to n - 1 are the same tokens in both tokenizers.

    Args:
        cut_renamed_control_tokens: where all ids with two names are control tokens (added tokens
            in both, as `<|endoftext|>` and DeepSeek's end of sentence, both 151643), end the
            shared ids before the first of them, and say so. False makes them an error, like any
            other difference.

    Raises:
        DataError: the tokenizers differ; names the first id and both strings.
    """
    # Vocabularies, not `len`: two tokenizers of one size may name different tokens.
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for owner, vocabulary in (("student", student), ("teacher", teacher)):
        if not vocabulary:
            raise DataError(f"the {owner}'s tokenizer is empty; give it a complete tokenizer.json")
    student_tokens = {index: token for token, index in student.items()}
    if student == teacher:
        return _end(student_tokens.keys())
    teacher_tokens = {index: token for token, index in teacher.items()}
    common = student_tokens.keys() & teacher_tokens.keys()
    renamed = [index for index in common if student_tokens[index] != teacher_tokens[index]]
    if (
        cut_renamed_control_tokens
        and renamed
        and _all_added(renamed, student_tokenizer, teacher_tokenizer)
    ):
        first = min(renamed)
        logger.warning(
            "%d control tokens differ, from id %d (%r for the student, %r for the teacher): only "
            "the ids before it are shared",
            len(renamed),
            first,
            student_tokens[first],
            teacher_tokens[first],
        )
        renamed = []
        common = {index for index in common if index < first}
    # Ids that only one side has are harmless behind the last shared one, and an error before it.
    end = max(common, default=-1)
    one_sided = [index for index in student_tokens.keys() ^ teacher_tokens.keys() if index < end]
    if renamed or one_sided or not common:
        first = min([*renamed, *one_sided], default=min(student_tokens))
        raise DataError(
            f"student and teacher have different tokenizers: id {first} is "
            f"{_name(student_tokens, first)} for the student, {_name(teacher_tokens, first)} for "
            "the teacher. Distillation compares them id by id: choose two models that share one "
            f"tokenizer (vocab_size here: {len(student)} and {len(teacher)})"
        )
    return _end(common)


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
    *,
    cut_renamed_control_tokens: bool = False,
) -> int:
    """Return n: ids 0 to n - 1 are real tokens, the same in both tokenizers, and rows of both
    heads.

    Says once in the log when a head is cut, with the sizes.

    Args:
        student_vocab_size: rows of the student's head (`config.vocab_size`), likewise the
            teacher's.
        cut_renamed_control_tokens: see `check_same_tokenizer`.

    Raises:
        DataError: the tokenizers differ; names the first id and both strings.
    """
    real = check_same_tokenizer(
        student_tokenizer,
        teacher_tokenizer,
        cut_renamed_control_tokens=cut_renamed_control_tokens,
    )
    # Rows beyond the tokenizer are padding: their logits are noise that softmax would count.
    shared = min(real, student_vocab_size, teacher_vocab_size)
    if shared < real:
        _log_once(
            logging.WARNING,
            f"the tokenizers share {real} ids but the heads have {student_vocab_size} (student) and "
            f"{teacher_vocab_size} (teacher) rows: only the first {shared} ids count",
        )
    elif shared < max(student_vocab_size, teacher_vocab_size):
        _log_once(
            logging.INFO,
            f"vocabulary cut to the {shared} shared real ids (student's head {student_vocab_size}, "
            f"teacher's {teacher_vocab_size} rows)",
        )
    return shared


def _end(ids: Collection[int]) -> int:
    """One more than the largest id; ids below it without a token are said in the log."""
    end = max(ids) + 1
    if end > len(ids):
        _log_once(
            logging.INFO,
            f"{end - len(ids)} of the first {end} ids have no token in either tokenizer; they stay",
        )
    return end


def _all_added(ids: Collection[int], *tokenizers: PreTrainedTokenizerBase) -> bool:
    return all(tokenizer.added_tokens_decoder.keys() >= set(ids) for tokenizer in tokenizers)


def _name(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "no token"


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
