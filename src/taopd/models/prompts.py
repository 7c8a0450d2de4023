"""Prompts from disk or hub: loaded, checked and encoded, with one clear message for every failure.

What: `load_prompts` reads a dataset with a `prompt` column (text or a list of messages) and, on
request, an `answer` column; `encode_prompts` turns prompts into ids exactly as TRL's trainer does;
`check_prompt_lengths` finds a prompt that does not fit the context before a run starts.
`load_model` and `load_tokenizer` come from `checkpoints` and are named here too.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError, suggest
from taopd.models.loading import (
    DATASET_READERS,
    UNREADABLE,
    check_hub,
    context_length,
    load_model,
    load_tokenizer,
    looks_local,
    root_cause,
)

__all__ = [
    "check_prompt_lengths",
    "context_length",
    "encode_prompts",
    "load_model",
    "load_prompts",
    "load_tokenizer",
]

_UNREADABLE = (*UNREADABLE, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
# Tokens that a chat template may add beyond those of the first prompt.
_TEMPLATE_MARGIN = 64


def load_prompts(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    split: str | None = "train",
    require_answer: bool = False,
) -> datasets.Dataset:
    """Load a dataset of prompts: a local .parquet, .jsonl, .json or .csv file, a local folder, or a
    hub id.

    Args:
        config: configuration of a hub dataset ("main", "en", ...).
        split: name of the split. A single file with a `split` column is filtered by it; a single
            file without one is its own "train". None takes "test" if there is one, else the only
            split.
        require_answer: demand an `answer` column too.

    Raises:
        DataError: missing, empty or unreadable; no such split; no `prompt` (or `answer`) column, or
            a row whose prompt is empty.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if os.path.isfile(path):  # false also for a name that no file can have
        rows = _load_file(path, split)
    elif os.path.isdir(path):
        rows = _pick_split(name, _load_folder(path), split)
    elif looks_local(name):
        raise DataError(f"no such dataset: {name} (looked in {Path.cwd()})")
    else:
        rows = _pick_split(name, _load_from_hub(name, config), split)
    for column in ("prompt", "answer") if require_answer else ("prompt",):
        if column not in rows.column_names:
            raise DataError(
                f"{name} has no {column!r} column, only {', '.join(rows.column_names) or 'none'}; "
                "rename one, for "
                f"instance with dataset.rename_column({(rows.column_names or ['x'])[0]!r}, "
                f"{column!r}), and save it"
            )
    if not len(rows):
        raise DataError(f"{name} has no rows" + (f" in split {split!r}" if split else ""))
    return rows


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the token ids of every prompt, as TRL's trainer makes them.

    Text is encoded as it is; a list of messages goes through the chat template with a generation
    prompt.

    Raises:
        DataError: an empty prompt, or one that is neither text nor messages; or messages without a
            chat template.
    """
    for row, prompt in enumerate(prompts):
        _check_prompt(prompt, row)
    if not prompts:
        return []
    # TRL decides by the first row too: a mixed set would be encoded in two ways.
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    if tokenizer.chat_template is None:
        raise DataError(
            "the prompts are lists of messages but the tokenizer has no chat template; use plain "
            "text"
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(prompts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )
    # The sandbox refuses with a TemplateError, ranges beyond its limit with an OverflowError.
    except (jinja2.TemplateError, ArithmeticError, LookupError, *_UNREADABLE) as error:
        raise DataError(f"the chat template cannot be used: {root_cause(error)}") from error
    return encoded["input_ids"]


def check_prompt_lengths(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Check that every prompt and its completion fit the context. Lengths are in tokens.

    A token covers at least one byte, so only prompts with more bytes than the limit are encoded: a
    million short prompts take seconds.

    Args:
        context_length: `max_position_embeddings`, the smaller of both models; None (no limit)
            checks only that prompts are well formed.

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
    overhead = 0
    start = 0
    for batch in rows.select_columns(["prompt"]).iter(batch_size=1000):
        prompts = batch["prompt"]
        for row, prompt in enumerate(prompts, start=start):
            _check_prompt(prompt, row)
        if start == 0:
            first = encode_prompts(
                tokenizer, prompts[:1], chat_template_kwargs=chat_template_kwargs
            )
            overhead = len(first[0]) + _TEMPLATE_MARGIN
        suspects = [
            i
            for i, p in enumerate(prompts)
            if limit is not None and _num_bytes(p) + overhead > limit
        ]
        ids = encode_prompts(
            tokenizer, [prompts[i] for i in suspects], chat_template_kwargs=chat_template_kwargs
        )
        for index, prompt_ids in zip(suspects, ids, strict=True):
            if limit is not None and len(prompt_ids) > limit:
                raise DataError(
                    f"the prompt of row {start + index} has {len(prompt_ids)} tokens; with "
                    "max_completion_length="
                    f"{max_completion_length} and a context of {context_length} there is room for "
                    f"{limit}. Drop "
                    "the row, shorten it, or lower max_completion_length"
                )
        start += len(prompts)


def _load_file(path: Path, split: str | None) -> datasets.Dataset:
    reader = DATASET_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read {path}: a dataset file ends in {', '.join(DATASET_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        rows = datasets.load_dataset(reader, data_files=str(path), split="train")
    except _UNREADABLE as error:
        raise DataError(f"cannot read {path} as {reader}: {root_cause(error)}") from error
    if "split" not in rows.column_names:
        if split not in (None, "train"):
            raise DataError(
                f"{path} has no split {split!r}: without a 'split' column all of it is 'train'"
            )
        return rows
    # A single file may carry its splits in a column: one file is easier to move than a folder.
    names = sorted(str(name) for name in rows.unique("split"))
    chosen = _choose(str(path), names, split)
    return rows.select([row for row, name in enumerate(rows["split"]) if str(name) == chosen])


def _load_folder(path: Path) -> Any:
    if not any(path.iterdir()):
        raise DataError(f"the dataset folder {path} is empty")
    try:
        # Both layouts are folders: `save_to_disk` of a dataset, or loose data files.
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path))
    except _UNREADABLE as error:
        raise DataError(f"cannot read the dataset folder {path}: {root_cause(error)}") from error


def _load_from_hub(name: str, config: str | None) -> Any:
    # What was loaded once is found without the hub.
    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        check_hub(name, "dataset")
    try:
        return datasets.load_dataset(name, config)
    except _UNREADABLE as error:
        raise DataError(
            f"cannot load the dataset {name!r}: it is no local file or folder, and the hub says: "
            f"{root_cause(error)}"
        ) from error


def _pick_split(name: str, loaded: Any, split: str | None) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        if split not in (None, "train"):
            raise DataError(
                f"{name} has no split {split!r}: it was saved without splits, all of it is 'train'"
            )
        return loaded
    return loaded[_choose(name, sorted(loaded), split)]


def _choose(name: str, splits: list[str], split: str | None) -> str:
    if split is None:
        # Evaluation asks without a name; several unnamed splits would be a guess.
        if "test" in splits or len(splits) == 1:
            return "test" if "test" in splits else splits[0]
        raise DataError(f"{name} has several splits, {', '.join(splits)}: name one")
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}.{suggest(split, splits)}")
    return split


def _check_prompt(prompt: Any, row: int) -> None:
    if isinstance(prompt, str):
        if prompt.strip():
            return
    elif isinstance(prompt, list):
        if prompt and all(
            isinstance(message, Mapping) and message.get("content") for message in prompt
        ):
            return
    elif prompt is not None:
        raise DataError(
            f"the prompt of row {row} is {type(prompt).__name__}; it must be text, or a list of "
            "messages with role "
            "and content"
        )
    raise DataError(f"the prompt of row {row} is empty; drop the row")


def _num_bytes(prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(len(str(message["content"]).encode()) + _TEMPLATE_MARGIN for message in prompt)
