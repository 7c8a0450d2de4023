"""Prompts from disk or hub: loaded, checked and encoded, with one clear message for every failure.

What: `load_prompts` reads a dataset with a `prompt` column (text or a list of messages) and, on
request, an `answer` column; `encode_prompts` turns prompts into ids, as TRL's trainer does where all
rows are of one kind. What a row may look like is in `prompt_rows`, and whether it fits in `prompt_lengths`.
`load_model` and `load_tokenizer` of `loading` and `context_length` of `context` are named here too.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError, nearest, suggest
from taopd.models.context import context_length
from taopd.models.damage import root_cause
from taopd.models.loading import (
    DATASET_READERS,
    UNREADABLE,
    check_hub,
    load_model,
    load_tokenizer,
    looks_local,
)
from taopd.models.prompt_files import (
    check_names,
    read_file,
    read_folder,
    refuse_cache,
    with_values,
)
from taopd.models.prompt_rows import TURNS, Prompt, read_prompt, render, split_turns
from taopd.runs.paths import expanded

__all__ = [
    "context_length",
    "encode_prompts",
    "load_model",
    "load_prompts",
    "load_tokenizer",
]

_UNREADABLE = (*UNREADABLE, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
logger = logging.getLogger(__name__)


def load_prompts(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    split: str | None = "train",
    require_answer: bool = False,
) -> datasets.Dataset:
    """Load a dataset of prompts: a local .parquet, .jsonl, .json or .csv file, a local folder, or a
    hub id.

    Without a column `prompt` the prompts are made from `messages` or `conversations`: the turns up to the
    last user turn.

    Args:
        config: configuration of a hub dataset ("main", "en", ...).
        split: name of the split. A single file with a `split` column is filtered by it; a single
            file without one is its own "train". None takes "test" if there is one, else the only
            split.
        require_answer: demand an `answer` column too.

    Raises:
        DataError: missing, empty or unreadable; no such split; no column that holds prompts (or answers),
            or a row whose prompt is empty.
    """
    name, path = str(name_or_path), expanded(name_or_path)
    if os.path.isfile(path):  # false also for a name that no file can have
        rows = _load_file(path, split)
    elif os.path.isdir(path):
        rows = _of_folder(path, _load_folder(path), split)
    elif looks_local(name):
        raise DataError(f"no such dataset: {name} (looked in {Path.cwd()})")
    else:
        rows = _pick_split(name, _load_from_hub(name, config), split)
    if os.path.exists(path):
        check_names(path, rows.column_names)
    if not len(rows):
        raise DataError(f"{name} has no rows" + (f" in split {split!r}" if split else ""))
    try:  # The reader of JSON lines takes bytes as they are; they would fail where a row is read.
        rows.data.table.validate(full=True)
    except pyarrow.ArrowException as error:
        where = str(error).rpartition("Invalid: ")[2]
        raise DataError(
            f"{name} holds text that is not UTF-8 ({where}); save it as UTF-8"
        ) from error
    rows = _with_prompts(_with_names(rows), name, with_answer=require_answer)
    for column in ("prompt", "answer") if require_answer else ("prompt",):
        if column not in rows.column_names:
            raise DataError(
                f"{name} has no {column!r} column, only {', '.join(rows.column_names) or 'none'}; "
                f"{_how_to_have(column, rows)}. Whole conversations belong into a column 'messages'"
            )
    return rows


def _with_names(rows: datasets.Dataset) -> datasets.Dataset:
    """With the names of class labels as text: their numbers are what no completion says."""
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.ClassLabel):
            # -1 stands for a label that is not known.
            known = [label if label is not None and label >= 0 else None for label in rows[column]]
            names = [None if label is None else kind.int2str(label) for label in known]
            rows = with_values(rows, column, names)
    return rows


def _how_to_have(column: str, rows: datasets.Dataset) -> str:
    """What to do about a column that is missing: rename one that holds something else of no use here."""
    texts = [key for key, value in rows[0].items() if isinstance(value, str)]
    free = [key for key in texts if key not in ("prompt", "answer", "split", "teacher_prompt")]
    if column == "answer" and not free:
        return "add one with the right answer to each prompt"
    old = (free or ["x"])[0]
    return f"rename one, for instance with dataset.rename_column({old!r}, {column!r}), and save it"


def _with_prompts(rows: datasets.Dataset, name: str, *, with_answer: bool) -> datasets.Dataset:
    """With a `prompt` column made of whole conversations, where these are all there is."""
    turns = next((column for column in TURNS if column in rows.column_names), None)
    if "prompt" in rows.column_names or turns is None:
        return rows
    # An answer of the set's own is what graders expect; the reply may be a whole solution.
    keeps = with_answer and "answer" not in rows.column_names

    def split(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, reply = split_turns(row[turns], f"row {index}")
        return {"prompt": prompt} | ({"answer": reply} if keeps else {})

    # As JSON, because messages of several kinds do not fit one table.
    added = {"prompt": datasets.Json()} | ({"answer": datasets.Value("string")} if keeps else {})
    features = datasets.Features({**rows.features, **added})
    try:
        found = rows.map(split, with_indices=True, features=features)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read the {turns} of {name}: {root_cause(error)}") from error
    logger.warning(
        "%s has no 'prompt' column: a prompt is what %r holds up to the last user turn%s",
        name,
        turns,
        ", the answer the assistant's last text after it" if keeps else "",
    )
    return found


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Any] = (),
    template: str | None = None,
) -> list[list[int]]:
    """Return the token ids of every prompt, each by its own kind.

    Text is encoded as it is; a list of messages goes through the chat template with a generation
    prompt.

    Args:
        prompts: rows of a dataset, of which the columns `prompt`, `tools` and `chat_template_kwargs`
            count; or bare prompts.
        options, tools, template: see `prompt_rows.render`.

    Raises:
        DataError: an empty prompt, one of which the tokenizer keeps nothing, or one that is neither text nor
            messages; or messages without a chat template.
    """
    read = [
        prompt if isinstance(prompt, Prompt) else read_prompt(prompt, f"row {row}")
        for row, prompt in enumerate(prompts)
    ]
    texts = [
        render(tokenizer, prompt, options=options, tools=tools, template=template)
        for prompt in read
    ]
    ids: list[list[int]] = [[] for _ in read]
    # A template writes the special tokens itself; text gets those that the tokenizer adds.
    for plain in (True, False):
        rows = [row for row, prompt in enumerate(read) if isinstance(prompt.content, str) == plain]
        if rows:
            chosen = [texts[row] for row in rows]
            encoded = tokenizer(text=chosen, add_special_tokens=plain)["input_ids"]
            for row, found in zip(rows, encoded, strict=True):
                # Nothing stands before the completion: its first token would follow padding.
                if not found:
                    raise DataError(
                        f"the prompt of {read[row].where} has no tokens: the tokenizer drops all of "
                        f"{texts[row][:40]!r}. Drop the row"
                    )
                ids[row] = found
    return ids


def _load_file(path: Path, split: str | None) -> datasets.Dataset:
    reader = DATASET_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read {path}: a dataset file ends in {', '.join(DATASET_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if _has_no_rows(path):  # which the reader below answers with an error about batch sizes
        raise DataError(f"{path} has no rows")
    try:
        rows = read_file(path)
    except DataError:
        raise
    except _UNREADABLE as error:
        refuse_cache(error)
        if "corresponds to no data" in str(error):  # a header alone
            raise DataError(f"{path} has no rows") from error
        raise DataError(f"cannot read {path} as {reader}: {root_cause(error)}") from error
    if "split" in rows.column_names:
        return _by_column(path, rows, split)
    if split not in (None, "train"):
        raise DataError(
            f"{path} has no split {split!r}: without a 'split' column all of it is 'train'"
        )
    return rows


def _by_column(path: Path, rows: datasets.Dataset, split: str | None) -> datasets.Dataset:
    """The rows of a split where a column tells them apart: one table is easier to move than several."""
    named = [str(name) for name in rows["split"][:]]
    names = sorted(set(named))
    missing = split is not None and split not in names
    if missing and not nearest(split, names):
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{path} has no split {split!r}: its column 'split' holds {held}; name one of them as the split, "
            "or rename the column if it means something else"
        )
    chosen = _choose(str(path), names, split)
    return rows.select([row for row, name in enumerate(named) if name == chosen])


def _has_no_rows(path: Path) -> bool:
    """Whether this is a table without rows; False for what cannot be read."""
    try:
        return (
            path.suffix.lower() == ".parquet" and not pyarrow.parquet.read_metadata(path).num_rows
        )
    except (OSError, pyarrow.ArrowException):
        return False


def _load_folder(path: Path) -> Any:
    if not any(path.iterdir()):
        raise DataError(f"the dataset folder {path} is empty")
    if (files := list(path.rglob("*.parquet"))) and all(map(_has_no_rows, files)):
        raise DataError(f"the dataset folder {path} has no rows")
    try:
        # Both layouts are folders: `save_to_disk` of a dataset, or loose data files.
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        return read_folder(path)
    except DataError:
        raise
    except _UNREADABLE as error:
        refuse_cache(error)
        cause = error.__cause__
        # A cast names the columns that differ in the lines after its first.
        cast = isinstance(cause, datasets.table.CastError)
        told = " ".join(str(cause).split()) if cast else root_cause(error)
        raise DataError(f"cannot read the dataset folder {path}: {told}") from error


def _of_folder(path: Path, loaded: Any, split: str | None) -> datasets.Dataset:
    """The rows of a split; where the folder has one table, its column may tell the splits apart."""
    only = loaded if isinstance(loaded, datasets.Dataset) else None
    if only is None and list(loaded) == ["train"]:
        only = loaded["train"]
    if only is not None and "split" in only.column_names:
        return _by_column(path, only, split)
    return _pick_split(str(path), loaded, split)


def _load_from_hub(name: str, config: str | None) -> Any:
    # What was loaded once is found without the hub.
    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        check_hub(name, "dataset")
    try:
        return datasets.load_dataset(name, config)
    except _UNREADABLE as error:
        refuse_cache(error)
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
