"""A safetensors file of nested state (optimizers, random generators, buffers), without pickle.

Tensors are stored as such. The dictionaries, lists, tuples, numbers, texts and None around them are JSON in
the file's header. Reading gives equal values of equal types, and cannot run code.

    tensor -> {"tensor": name}    dict -> {"dict": [[key, value], ...]}    tuple -> {"tuple": [...]}
    shard of a larger tensor -> {"block": [name, shape of the full tensor, offset of the shard in it]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taopd.errors import DataError

_KEY = "taopd_tree"


@dataclass(frozen=True, slots=True)
class Shard:
    """The block of a sharded tensor that one process holds."""

    values: Tensor | None
    """None if the file was read without them."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    start: tuple[int, ...]
    """Index of the shard's first element in it."""
    size: tuple[int, ...]
    """Shape of the shard."""


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a tree of plain values, tensors and shards.

    Raises:
        DataError: a value of another kind; names its path in the tree.
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(tree, tensors, "")
    try:
        save_file(tensors, path, metadata={_KEY: json.dumps(skeleton)})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def check_tree(tree: Any) -> None:
    """Refuse what `save_tree` would refuse, without a copy of any tensor."""
    _pack(tree, None, "")


def load_tree(path: str | Path, *, shard_values: bool = True) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU.

    Args:
        shard_values: read the values of shards; without them only the header of a large file is read.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            skeleton = json.loads((stored.metadata() or {})[_KEY])
            return _unpack(skeleton, stored, shard_values=shard_values)
    # A damaged file fails in any of these ways; none of them is a bug of the caller's.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a state file that taopd wrote: {error}") from error


def _pack(value: Any, tensors: dict[str, Tensor] | None, where: str) -> Any:
    if isinstance(value, Tensor | Shard) and tensors is None:
        return None
    if isinstance(value, Tensor):
        assert tensors is not None
        name = str(len(tensors))
        tensors[name] = _own(value, tensors)
        return {"tensor": name}
    if isinstance(value, Shard):
        assert value.values is not None
        name = _pack(value.values, tensors, where)["tensor"]
        return {"block": [name, list(value.shape), list(value.start)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        # JSON turns integer keys into text: keys are written as values, so only what JSON holds exactly.
        if not all(isinstance(key, (int, str)) for key in value):
            raise DataError(f"cannot be saved without pickle: the keys of {where or 'the state'}")
        return {"dict": [[key, _pack(value[key], tensors, f"{where}/{key}")] for key in value]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise DataError(f"cannot be saved without pickle: {where} is a {type(value).__name__}")


def _own(value: Tensor, others: dict[str, Tensor]) -> Tensor:
    """On the CPU, in memory of its own: safetensors refuses views and tensors that share."""
    value = value.detach().to("cpu")
    storage = value.untyped_storage()
    # Tied weights share memory, and safetensors writes no tensor twice.
    shared = any(
        storage.data_ptr() == other.untyped_storage().data_ptr() for other in others.values()
    )
    if shared or not value.is_contiguous() or storage.nbytes() != value.nbytes:
        return value.clone(memory_format=torch.contiguous_format)
    return value


def _unpack(skeleton: Any, stored: Any, *, shard_values: bool) -> Any:
    if isinstance(skeleton, list):
        return [_unpack(item, stored, shard_values=shard_values) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        # A copy: what is read otherwise stays mapped to the file for as long as it is used.
        return stored.get_tensor(content).clone()
    if kind == "block":
        name, shape, start = content
        size = tuple(stored.get_slice(name).get_shape())
        if not len(size) == len(shape) == len(start):
            raise ValueError(f"shard {name} has {len(size)} dimensions, its tensor {len(shape)}")
        values = stored.get_tensor(name).clone() if shard_values else None
        return Shard(values, tuple(shape), tuple(start), size)
    if kind == "tuple":
        return tuple(_unpack(item, stored, shard_values=shard_values) for item in content)
    return {key: _unpack(item, stored, shard_values=shard_values) for key, item in content}
