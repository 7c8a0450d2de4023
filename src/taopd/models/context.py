"""How many tokens of a prompt and its completion a model reads as it was made to."""

import logging
from functools import cache
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def context_length(*models: PreTrainedModel) -> int | None:
    """Return the shortest context of the models in tokens, or None; see `context_of`."""
    lengths = [context_of(model.config) for model in models]
    return min((length for length in lengths if length), default=None)


def context_of(config: PretrainedConfig) -> int | None:
    """The context of a model in tokens, or None where it is not known.

    `max_position_embeddings`, and with longrope (Phi-3, Phi-4-mini) at most the length up to which positions
    are rotated by the first of its two lists of factors. Beyond it the second is taken, for all rows of a
    batch if one of them is longer: the numbers of a row would depend on the rows beside it.
    """
    config = config.get_text_config()
    most: int | None = getattr(config, "max_position_embeddings", None) or None
    rotation: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of them.
    for each in (rotation, *(kind for kind in rotation.values() if isinstance(kind, dict))):
        first = each.get("original_max_position_embeddings")
        if each.get("rope_type") == "longrope" and first and (most is None or first < most):
            _say_shorter(config.model_type, first, most)
            most = first
    return most


@cache
def _say_shorter(family: str, context: int, most: int | None) -> None:
    logger.warning(
        "%s: the context is taken to be %d tokens and not %s: beyond it positions are rotated otherwise "
        "(longrope), for all rows of a batch at once",
        *(family, context, most),
    )
