"""Whether prompts fit the context, before a run starts."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError
from taopd.models.prompt_rows import COLUMNS, MEDIA, Prompt, read_prompt
from taopd.models.prompts import encode_prompts
from taopd.models.teacher_prompts import TeacherPrompts

# Tokens that a chat template may add beyond those of the first prompt.
_TEMPLATE_MARGIN = 64


def check_prompt_lengths(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    teacher_prompts: TeacherPrompts | None = None,
    tools: Sequence[Any] = (),
) -> None:
    """Check that every prompt and its completion fit the context. Lengths are in tokens.

    A token covers at least one byte, so only prompts with more bytes than the limit are encoded: a
    million short prompts take seconds.

    Args:
        context_length: `max_position_embeddings`, the smaller of both models; None (no limit)
            checks only that prompts are well formed.
        chat_template_kwargs, tools: see `prompt_rows.render`.
        teacher_prompts: look at these in place of the student's; `context_length` is then the teacher's.

    Raises:
        DataError: names the first row that does not fit, and the lengths.
    """
    limit = None if context_length is None else context_length - max_completion_length
    if limit is not None and limit < 1:
        raise DataError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt: the "
            "context has "
            f"{context_length} tokens. Lower max_completion_length"
        )
    # Bytes bound tokens from above, so that most prompts need no encoding at all.
    overhead, start = 0, 0
    shown: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "tools": tools}
    whose = "prompt" if teacher_prompts is None else "teacher's prompt"
    needed = [*COLUMNS, *MEDIA, *(teacher_prompts.columns if teacher_prompts else ())]
    columns = [name for name in needed if name in rows.column_names]
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        size = len(next(iter(batch.values())))
        # Row by row, so that an error names the row.
        prompts = []
        for row in range(size):
            entry = {name: batch[name][row] for name in columns}
            prompt = read_prompt(entry, where := f"row {start + row}")
            if teacher_prompts is not None:
                prompt = teacher_prompts.of(entry, prompt, where) or prompt
            prompts.append(prompt)
        if start == 0:
            first = encode_prompts(tokenizer, prompts[:1], **shown)
            overhead = len(first[0]) + _TEMPLATE_MARGIN
        suspects = [
            i
            for i, p in enumerate(prompts)
            if limit is not None and _num_bytes(p) + overhead > limit
        ]
        ids = encode_prompts(tokenizer, [prompts[i] for i in suspects], **shown)
        for index, prompt_ids in zip(suspects, ids, strict=True):
            if limit is not None and len(prompt_ids) > limit:
                raise DataError(
                    f"the {whose} of row {start + index} has {len(prompt_ids)} tokens; with "
                    f"max_completion_length={max_completion_length} and a context of {context_length} tokens "
                    f"there is room for {limit} tokens. Drop the row, shorten it, or lower "
                    "max_completion_length"
                )
        start += size


def _num_bytes(prompt: Prompt) -> float:
    """At least as many as tokens; unknown where a template writes JSON."""
    if isinstance(prompt.content, str):
        return len(prompt.content.encode())
    if prompt.tools or prompt.options or any("tool_calls" in m for m in prompt.content):
        return float("inf")
    return sum(len(m["content"].encode()) + _TEMPLATE_MARGIN for m in prompt.content)
