"""Which token ids end a completion, for student and teacher together."""

from collections.abc import Sequence
from typing import Any

from taopd.errors import ConfigError


def stop_ids(
    stop_tokens: str, stop_token_ids: Sequence[int] | None, tokenizer: Any, *models: Any
) -> tuple[int, ...]:
    """Ids that the setting `stop_tokens` is about, ascending; () where stop tokens are like any other.

    Those given, else the tokenizer's end of sequence and whatever the models' generation configs stop at.

    Raises:
        ConfigError: if there is none, or only one to merge.
    """
    if stop_tokens == "train":
        return ()
    found: set[int] = set(stop_token_ids or [])
    if stop_token_ids is None:
        configs = [getattr(model, "generation_config", None) for model in models]
        for source in (tokenizer, *configs):
            ids = getattr(source, "eos_token_id", None)
            found |= set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if not found:
        raise ConfigError("stop_tokens: the models name no end-of-sequence id; set stop_token_ids")
    if stop_tokens == "merge" and len(found) < 2:
        raise ConfigError(
            f"stop_tokens='merge' has one id only, {min(found)}; set stop_token_ids to all ids that end a "
            "completion, or leave stop_tokens='train'"
        )
    return tuple(sorted(found))
