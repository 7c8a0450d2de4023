"""The rollouts of a bank: prompts and completions as token ids.

Three sources: `sample_rollouts` samples from the student, `read_completions` reads a file, and
`taopd.diagnose.collect.RolloutCollector` observes a trainer. Ids are kept as they were sampled. Text is
encoded only where no ids are given, because decoding and encoding need not return the same tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from taopd.errors import DataError, require
from taopd.models.batch import Rollouts
from taopd.models.generation import (
    generate_ids,
    generation_settings,
    undisturbed,
)
from taopd.models.prompt_rows import read_prompt
from taopd.models.prompts import context_length, encode_prompts
from taopd.models.stop_tokens import sampler_stop_ids
from taopd.models.teacher_prompts import COLUMN, TeacherPrompts
from taopd.runs.validation import parse_json, read_text

NUM_COMPLETIONS = 300
"""Published size of a bank: 300 responses of 192 tokens, 57,600 positions. [arXiv 2605.26844]"""
MAX_TOKENS = 192


def sample_rollouts(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    num_completions: int = NUM_COMPLETIONS,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    teacher_prompts: TeacherPrompts | None = None,
    template_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Completions sampled from the student; completion i answers prompt i modulo their number.

    The model's mode, the tokenizer's padding side and torch's random state are as before afterwards.

    Args:
        prompts: rows or bare prompts, as `taopd.models.prompts.encode_prompts` takes them.
        batch_size: completions sampled together; part of what a seed reproduces.
        teacher_prompts: where the teacher's own come from; default the column `teacher_prompt`, if any.
        template_options: of the chat template (`chat_template_kwargs` of a run); a row's own win.
        progress: called with (completions done, completions in all).

    Raises:
        ConfigError: a setting out of range.
        DataError: no prompts, or one too long for the context.
    """
    for name, value in (
        ("num_completions", num_completions),
        ("max_tokens", max_tokens),
        ("batch_size", batch_size),
    ):
        require(value >= 1, name, value, "at least 1")
    require(temperature > 0, "temperature", temperature, "above 0")
    if not len(prompts):
        raise DataError("no prompts: a bank needs at least one")
    rows = list(prompts)[:num_completions]
    encoded = encode_prompts(tokenizer, rows, options=template_options)
    found = (teacher_prompts or TeacherPrompts()).of_rows(rows)
    own = None if found is None else encode_prompts(tokenizer, found, options=template_options)
    context = context_length(student)
    for row, ids in enumerate(encoded):
        if context is not None and len(ids) + max_tokens > context:
            raise DataError(
                f"prompt {row} has {len(ids)} tokens; with max_tokens={max_tokens} that exceeds the "
                f"context of {context}. Lower max_tokens or drop the prompt"
            )
    prompt_ids = [encoded[index % len(encoded)] for index in range(num_completions)]
    eos_ids = sampler_stop_ids(tokenizer, student)
    config = GenerationConfig(
        **generation_settings(tokenizer, eos_ids, False, temperature, max_tokens)
    )
    completions: list[list[int]] = []
    with torch.no_grad(), undisturbed(student, tokenizer, seed):
        for start in range(0, num_completions, batch_size):
            sampled = generate_ids(student, prompt_ids[start : start + batch_size], config)
            completions += [_until_end(ids, eos_ids) for ids in sampled.tolist()]
            if progress is not None:
                progress(len(completions), num_completions)
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=completions,
        teacher_prompt_ids=own and [own[index % len(own)] for index in range(num_completions)],
        settings={
            "source": "sampled",
            "num_completions": num_completions,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "sampling_batch_size": batch_size,
        }
        | ({"chat_template_kwargs": dict(template_options)} if template_options else {}),
    )


def read_completions(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_completions: int | None = None,
    max_tokens: int | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> Rollouts:
    """Rollouts from JSON lines with `prompt` (text, messages or ids) and `completion` (text or ids).

    All of them, or none, may have a `teacher_prompt` too.

    Args:
        num_completions: only the first so many lines.
        max_tokens: cut every completion to so many tokens.
        template_options: as of `sample_rollouts`, for prompts that are messages.

    Raises:
        DataError: no such file, a folder, no lines, or a line without prompt or completion; names it.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; completions are a file of JSON lines")
    # Not as a log of a run is read: a line that cannot be read is the user's, also the last one.
    lines = enumerate(read_text(path).split("\n"), start=1)
    texts = [(number, line) for number, line in lines if line.strip()][:num_completions]
    rows = [(number, parse_json(line, f"{path}, line {number}")) for number, line in texts]
    if not rows:
        raise DataError(f"{path} has no completions")
    prompt_ids: list[list[int]] = []
    completion_ids: list[list[int]] = []
    own: list[list[int]] = []
    for number, row in rows:
        if not isinstance(row, dict) or not row.get("prompt") or not row.get("completion"):
            raise DataError(
                f"{path}, line {number}: expected an object with a prompt and a completion, neither "
                "of them empty"
            )
        prompt, completion = row["prompt"], row["completion"]
        for prompts, text in ((prompt_ids, prompt), (own, row.get(COLUMN))):
            if text:
                if _is_ids(text):
                    prompts.append(list(text))
                    continue
                # With the row's tools and options of the template.
                read = read_prompt(row | {"prompt": text}, f"line {number} of {path}")
                prompts.append(encode_prompts(tokenizer, [read], options=template_options)[0])
        if isinstance(completion, str):
            completion = tokenizer(completion, add_special_tokens=False)["input_ids"]
        elif not _is_ids(completion):
            raise DataError(f"{path}, line {number}: a completion is text or a list of token ids")
        completion_ids.append(list(completion)[:max_tokens])
    settings = {"source": "file", "num_completions": len(rows), "max_tokens": max_tokens}
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        settings=settings,
        teacher_prompt_ids=own or None,
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return ids[: end + 1]
