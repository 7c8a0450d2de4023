"""Stop tokens: the ids that end a completion. Every answer to "which ids stop" is here."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taopd.errors import ConfigError, DataError
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document, shown


def declared_ids(value: int | Sequence[int] | None) -> list[int]:
    """The ids of an `eos_token_id`, which a config gives as None, one id or several."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def ends_of(model: Any) -> list[int]:
    """The ids at which a model's generation config stops; none where it has no such config."""
    return declared_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def check_declared(folder: Path) -> None:
    """Refuse a generation config in which an end is no id.

    transformers passes over one that cannot be read: the model would sample past its stop ids.

    Raises:
        DataError: names the file and the setting.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    held = read_document(path, OBJECT)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = held.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(type(each) is int and each >= 0 for each in ids):
            raise DataError(f"{path}: {name} is {shown(value)}, and must be a token id, or null")


def sampler_stop_ids(tokenizer: Any, model: Any) -> list[int]:
    """Ids at which sampling stops: the tokenizer's end of sequence, then the generation config's.

    `trl.DistillationTrainer` comes to the same list and names it `eos_token_ids`.
    """
    declared = ends_of(model)
    # The two files of a checkpoint often disagree; sampling stops at the ids of both.
    end = declared_ids(tokenizer.eos_token_id)
    return [*(index for index in end if index not in declared), *declared]


def possible_stop_ids(tokenizer: Any, sampler: Iterable[int], *also: Iterable[int]) -> list[int]:
    """Ids that may end a text, ascending: the sampler's, every special token, and those of `also`."""
    special = {index for index in tokenizer.all_special_ids if index != tokenizer.unk_token_id}
    return sorted(special.union(sampler, *also))


def stop_ids(
    stop_tokens: str, stop_token_ids: Sequence[int] | None, tokenizer: Any, *models: Any
) -> tuple[int, ...]:
    """Ids that the setting `stop_tokens` is about, ascending; () where stop tokens are like any other.

    Those given, else those of the tokenizer and of all models (None: a teacher that is not here).

    Raises:
        ConfigError: if there is none, or only one to merge.
    """
    if stop_tokens == "train":
        return ()
    ids = set(stop_token_ids or [])
    if stop_token_ids is None:
        ids = {index for model in models for index in sampler_stop_ids(tokenizer, model)}
    if not ids:
        raise ConfigError("stop_tokens: the models name no end-of-sequence id; set stop_token_ids")
    if stop_tokens == "merge" and len(ids) < 2:
        raise ConfigError(
            f"stop_tokens='merge' has one id only, {min(ids)}; set stop_token_ids to all ids that end a "
            "completion, or leave stop_tokens='train'"
        )
    return tuple(sorted(ids))


def merged_ids(stop_tokens: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The stop ids that count as one token in both models; none unless `stop_tokens` merges them."""
    return tuple(ids) if stop_tokens == "merge" else ()


def foreign_ends(
    stop_tokens: str,
    stop_token_ids: Sequence[int] | None,
    sampler: Iterable[int],
    *teachers: Any,
) -> tuple[int, ...]:
    """Ids that end a teacher's texts and at which the sampler goes on, ascending.

    Known are the ids of the teachers' generation configs, and those given. Not those that `stop_tokens`
    merges into one with the sampler's: that one does end a completion.
    """
    ids = {index for teacher in teachers for index in ends_of(teacher)}
    if stop_tokens == "merge":
        # Without a choice of the user's all of them are merged, and else those given alone.
        merged = ids if stop_token_ids is None else set(stop_token_ids)
        return tuple(sorted(ids - merged - set(sampler)))
    return tuple(sorted(ids.union(stop_token_ids or ()) - set(sampler)))
