"""Whether prompts fit the context, before a run starts."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError
from taopd.models.columns import batches
from taopd.models.prompt_rows import COLUMNS, MEDIA, Prompt, read_prompt
from taopd.models.prompts import encode_prompts
from taopd.models.teacher_prompts import TeacherPrompts

# Tokens that a chat template may add beyond those of the first prompt of its kind.
_TEMPLATE_MARGIN = 64
_COUNTED = {"role", "content"}
"""Of a message: what the bound of its tokens knows."""


def check_prompt_lengths(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | Callable[[Any], int | None] | None,
    max_completion_length: int,
    teacher_prompts: TeacherPrompts | None = None,
    also: Sequence[str] = (),
    where: str = "",
    **shown: Any,
) -> None:
    """Check that every prompt and its completion fit the context. Lengths are in tokens.

    A token covers at least one byte, so only prompts with more bytes than the limit are encoded: a
    million short prompts take seconds.

    Args:
        rows: see `columns.batches`.
        context_length: `max_position_embeddings`, the smaller of both models; None (no limit)
            checks only that prompts are well formed. Or that of a row.
        teacher_prompts: look at these in place of the student's; `context_length` is then the teacher's.
        also: columns that the context of a row depends on.
        where: names the rows, as "the training set".
        shown: options, tools and template, see `encode_prompts`.

    Raises:
        DataError: names the first row that does not fit, and the lengths.
    """
    # Bytes bound tokens from above, so that most prompts need no encoding at all.
    overhead, start = dict[type, int](), 0
    of = f" of {where}" if where else ""
    whose = "prompt" if teacher_prompts is None else "teacher's prompt"
    needed = [*COLUMNS, *MEDIA, *(teacher_prompts.columns if teacher_prompts else ())]
    for batch in batches(rows, [*needed, *also]):
        # Row by row, so that an error names the row.
        prompts, limits = [], []
        for row, entry in enumerate(batch):
            prompt = read_prompt(entry, place := f"row {start + row}{of}")
            if teacher_prompts is not None:
                prompt = teacher_prompts.of(entry, prompt, place) or prompt
            prompts.append(prompt)
            context = context_length(entry) if callable(context_length) else context_length
            limits.append(_room(context, max_completion_length))
        suspects = []
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            # What a template adds, text beside messages does not show.
            if (kind := type(prompt.content)) not in overhead:
                (first,) = encode_prompts(tokenizer, [prompt], **shown)
                overhead[kind] = len(first) + _TEMPLATE_MARGIN
            if limit is not None and _num_bytes(prompt) + overhead[kind] > limit:
                suspects.append(index)
        ids = encode_prompts(tokenizer, [prompts[i] for i in suspects], **shown)
        for index, prompt_ids in zip(suspects, ids, strict=True):
            if (limit := limits[index]) is not None and len(prompt_ids) > limit:
                context = limit + max_completion_length
                raise DataError(
                    f"the {whose} of row {start + index}{of} has {len(prompt_ids)} tokens; with "
                    f"max_completion_length={max_completion_length} and a context of {context} tokens "
                    f"there is room for {limit} tokens. Drop the row, shorten it, or lower "
                    "max_completion_length"
                )
        start += len(batch)


def _room(context: int | None, max_completion_length: int) -> int | None:
    """Tokens of a prompt at most; None: no limit is known."""
    if context is not None and context <= max_completion_length:
        raise DataError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt: the context has "
            f"{context} tokens. Lower max_completion_length"
        )
    return None if context is None else context - max_completion_length


def _num_bytes(prompt: Prompt) -> float:
    """At least as many as tokens; unknown where a template may write more than the texts."""
    if isinstance(prompt.content, str):
        return len(prompt.content.encode())
    # As tool calls, or a thought beside the answer.
    if prompt.tools or prompt.options or any(m.keys() - _COUNTED for m in prompt.content):
        return float("inf")
    return sum(len(m["content"].encode()) + _TEMPLATE_MARGIN for m in prompt.content)
