"""What a pass without gradient leaves for the sparse one, and which backbones can leave it.

Keys and values are taken where the layers hand them to a cache, in the model's own attention
implementation: after the rotation by position, before grouped heads are repeated, uncut by sliding windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from taopd.errors import ConfigError
from taopd.models.batch import positions_of
from taopd.models.forward import without_checkpointing
from taopd.models.output_head import inside_peft

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValuePrefix:
    """What a no-grad pass over b sequences left behind; read-only."""

    keys: tuple[Float[Tensor, "b Hkv L d"], ...]
    """Per layer, after the rotation by position, before grouped heads are repeated."""
    values: tuple[Float[Tensor, "b Hkv L dv"], ...]
    hidden: Float[Tensor, "b L D"]
    """Last hidden states, after the final norm."""
    positions: Int[Tensor, "b L"]
    """Position ids of the pass."""

    def part(self, rows: Int[Tensor, " r"], columns: slice) -> "KeyValuePrefix":
        """The prefix of some rows and of a range of columns, as views where rows are all, in order."""
        # Views where possible: a copy of all layers' keys is as large as the prefix itself.
        everything = rows.tolist() == list(range(len(self.hidden)))

        def cut(tensor: Tensor, dim: int) -> Tensor:
            tensor = tensor if everything else tensor.index_select(0, rows)
            start, stop, _ = columns.indices(tensor.shape[dim])
            return tensor.narrow(dim, start, stop - start)

        return KeyValuePrefix(
            keys=tuple(cut(tensor, 2) for tensor in self.keys),
            values=tuple(cut(tensor, 2) for tensor in self.values),
            hidden=cut(self.hidden, 1),
            positions=cut(self.positions, 1),
        )

    @property
    def num_bytes(self) -> int:
        """Memory that the prefix holds."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.hidden))


def gather_prefix(
    prefixes: Mapping[int, KeyValuePrefix],
    source: Int[Tensor, " r"],
    rows: Int[Tensor, " r"],
    columns: slice,
) -> KeyValuePrefix:
    """Rows of several prefixes as one prefix, row j being row `rows[j]` of prefix `source[j]`.

    All must begin at the same column; columns that a shorter one lacks are zero, so they must be padding
    of its rows.
    """
    # Rows are shuffled after scoring, so that a training micro-batch mixes rows of several prefixes.
    used = source.unique().tolist()
    longest = min(prefixes[index].hidden.shape[1] for index in used)
    # The common case needs no new memory.
    if len(used) == 1 and columns.stop <= longest:
        return prefixes[used[0]].part(rows, columns)

    def gathered(dim: int, *tensors: Tensor) -> Tensor:
        """The rows, from one tensor of each used prefix."""
        shape = [len(rows), *tensors[0].shape[1:]]
        shape[dim] = columns.stop - columns.start
        out = tensors[0].new_zeros(shape)
        for index, tensor in zip(used, tensors, strict=True):
            mine = source == index
            length = min(columns.stop, tensor.shape[dim]) - columns.start
            cut = tensor.index_select(0, rows[mine]).narrow(dim, columns.start, length)
            out.narrow(dim, 0, length)[mine] = cut
        return out

    parts = [prefixes[index] for index in used]
    return KeyValuePrefix(
        keys=tuple(gathered(2, *layer) for layer in zip(*(p.keys for p in parts), strict=True)),
        values=tuple(gathered(2, *layer) for layer in zip(*(p.values for p in parts), strict=True)),
        hidden=gathered(1, *(part.hidden for part in parts)),
        positions=gathered(1, *(part.positions for part in parts)),
    )


class _StoredLayer(DynamicLayer):
    """Keeps what one pass hands over: no copy, no sliding window cut off, in the dtype attention reads."""

    def update(self, key_states, value_states, *args, **kwargs):
        # Attention casts what it reads under autocast; what is stored must be what it read.
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def backbone_of(model: Any) -> Any:
    """The module below the head: of a model, or of the model inside a PEFT wrapper."""
    model = inside_peft(model)
    return model.model if model.base_model is model else model.base_model


def check_backbone(backbone: Any) -> None:
    """Refuse what mixes positions by other means than causal attention.

    Raises:
        ConfigError: names the layer type or the class.
    """
    config = backbone.config.get_text_config()
    # A list of what works, not of what does not: a new kind of layer must be looked at first.
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(SUPPORTED_LAYERS))
    reason = None
    if others:
        reason = f"has layers of type {', '.join(others)}"
    elif getattr(backbone, "_is_stateful", False):
        reason = "carries a recurrent state from token to token"
    elif getattr(config, "num_kv_shared_layers", None):
        reason = "shares keys and values between layers"
    elif getattr(config, "use_bidirectional_attention", None):
        reason = "attends to later tokens"
    if reason is not None:
        raise ConfigError(
            f"gradient_window: {type(backbone).__name__} {reason}; supported are "
            f"{' and '.join(SUPPORTED_LAYERS)}: set gradient_window to none"
        )


@torch.no_grad()
def capture_prefix(
    model: Any, input_ids: Int[Tensor, "b L"], attention_mask: Int[Tensor, "b L"]
) -> KeyValuePrefix:
    """One pass without gradient over whole sequences, in the model's own attention implementation.

    Raises:
        ConfigError: if the backbone is not supported.
    """
    backbone = backbone_of(model)
    check_backbone(backbone)
    cache, positions = Cache(layer_class_to_replicate=_StoredLayer), positions_of(attention_mask)
    # Layers drop the cache that they are given while they checkpoint.
    with without_checkpointing(backbone):
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    # A layer that cuts or skips its cache would give the sparse pass other keys, without an error.
    stored = [
        layer.keys is not None and layer.keys.shape[2:3] == hidden.shape[1:2]
        for layer in cache.layers
    ]
    expected = backbone.config.get_text_config().num_hidden_layers
    if len(stored) != expected or not all(stored):
        raise ConfigError(
            f"gradient_window: {type(backbone).__name__} stored keys of {sum(stored)} of its {expected} "
            "layers; every layer must be an attention layer: set gradient_window to none"
        )
    return KeyValuePrefix(
        keys=tuple(layer.keys for layer in cache.layers),
        values=tuple(layer.values for layer in cache.layers),
        hidden=hidden,
        positions=positions,
    )
