"""Whether the weights below an adapter are those of the folder that the saved adapter will name.

An adapter is saved without the model below it, by that model's name. Of a model that was changed in memory,
as by training it further, the name leads to other weights: the saved student is another one.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from taopd.distributed.sharding import is_sharded
from taopd.models.loading import looks_local
from taopd.trainer.checkpoint.same_start import differ, places

logger = logging.getLogger(__name__)


def say_other_base(model: Any, name: str) -> None:
    """Warn of a model, to be trained by an adapter, whose weights are not those at its name."""
    weights = {_plain(each): weight for each, weight in model.state_dict().items()}
    # Packed weights have other names and numbers; those in parts, or not here, cannot be sampled.
    if getattr(model, "is_quantized", False) or any(map(_is_elsewhere, weights.values())):
        return
    for place, saved in _saved(name):
        now = weights.get(place)
        if now is None or not saved.numel():
            continue
        same = now.shape == saved.shape
        if same:
            index = places(saved.numel())
            before = saved.flatten()[index].float()
            after = now.detach().flatten()[index.to(now.device)].float().cpu()
            same = not differ(before[None], after[None])
        if not same:
            logger.warning(
                "the student's %s is not that of %s, which a saved adapter names as its base: whoever loads "
                "the adapter has another model. Save the student first, and load it from "
                "that folder",
                *(place, name),
            )
            return


def _saved(name: str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a folder, or of a model in the hub's cache; none where there is neither."""
    found = Path(name) / "config.json"
    if not found.is_file():
        cached = None if looks_local(name) else try_to_load_from_cache(name, "config.json")
        found = Path(cached) if isinstance(cached, str) else found
    for file in sorted(found.parent.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118 (no mapping)
                yield key, content.get_tensor(key)


def _plain(name: str) -> str:
    """A weight's name without what peft puts around its module."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _is_elsewhere(weight: Tensor) -> bool:
    return weight.is_meta or is_sharded(weight)
