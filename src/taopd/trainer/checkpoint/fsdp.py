"""Sharded checkpoints of FSDP2: one safetensors file per process for weights, one for the optimizer.

Why not accelerate's formats: the full ones gather everything on one process and pickle it, the distributed
one (torch's) pickles its index. Here a process writes its shards, each with the shape of the full tensor and
its offset in it. Neither writing nor reading needs communication. Reading works with any number of processes
(resharding): a process reads the shards that overlap with its own.

    shard-R.safetensors        weights and buffers of process R
    optimizer-R.safetensors    its optimizer state; learning rate schedule and fp16 scaler, the same on all
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import TrainingArguments

from taopd.errors import ConfigError, DataError
from taopd.runs.checkpoints import Layout, process_file
from taopd.trainer.checkpoint.state_file import Shard, load_tree, save_tree

WEIGHTS, OPTIMIZER = "shard", "optimizer"
_LAYOUTS: dict[DistributedType, Layout] = {
    DistributedType.FSDP: "sharded",
    DistributedType.DEEPSPEED: "deepspeed",
}


def layout_of(accelerator: Accelerator) -> Layout:
    """How the state of a run is distributed over its processes.

    Raises:
        ConfigError: by version 1 of FSDP, whose flattened parameters are not supported; or processes that
            share a batch, as those of tensor, context and sequence parallelism do.
    """
    # Signals and sums are taken over all processes as if each had completions of its own.
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(accelerator.parallelism_config, name, 1)) > 1:
            raise ConfigError(
                f"{name}={size} in parallelism_config is not supported: processes share no batch here; take "
                "DDP, FSDP2 or ZeRO"
            )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None
    # Flattened parameters have no shape of their own that a shard could be cut from.
    if plugin is not None and plugin.fsdp_version == 1:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version: 2")
    return _LAYOUTS.get(accelerator.distributed_type, "replicated")


def within_backward(args: TrainingArguments, accelerator: Accelerator) -> str:
    """Whose weights move within the backward, before anybody sees the gradient: DeepSpeed's, or those of an
    optimizer that updates layer by layer. Empty: they move after it."""
    if layout_of(accelerator) == "deepspeed":
        return "DeepSpeed"
    name = str(getattr(args.optim, "value", args.optim))
    return f"optim={name}" if name.endswith(("lomo", "_layerwise")) else ""


def save_weights(folder: Path, model: nn.Module, process: int, *, trained_only: bool) -> None:
    """Write this process's shards of the weights.

    Args:
        trained_only: leave out frozen weights, which come from the base model of an adapter.
    """
    shards = {name: shard_of(t) for name, t in _weights(model, trained_only=trained_only)}
    save_tree(folder / process_file(WEIGHTS, process), shards)


@torch.no_grad()
def load_weights(
    folder: Path,
    model: nn.Module,
    process: int,
    num_saved: int,
    num_now: int,
    *,
    trained_only: bool,
) -> None:
    """Read this process's shards of the weights.

    Args:
        num_saved: processes that wrote the checkpoint. num_now: those of this run.
    """
    targets = dict(_weights(model, trained_only=trained_only))
    writers = [process] if num_saved == num_now else range(num_saved)
    files = [folder / process_file(WEIGHTS, writer) for writer in writers]
    trees = _overlapping(files, lambda tree: tree, targets)
    for name, target in targets.items():
        stored = [tree[name] for tree in trees if name in tree]
        values = _assemble(f"{folder}: {name}", stored, target)
        local(target).copy_(values)


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, process: int, others: Mapping[str, Any]
) -> None:
    """Write this process's shards of the optimizer state.

    Args:
        others: states that are the same on all processes (schedule, scaler).
    """
    state = optimizer.state_dict()
    shards = {
        index: {name: shard_of(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    tree = {"state": shards, "param_groups": state["param_groups"], "others": dict(others)}
    save_tree(folder / process_file(OPTIMIZER, process), tree)


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, process: int, num_saved: int, num_now: int
) -> dict[str, Any]:
    """Read this process's shards of the optimizer state; return the other states.

    Raises:
        DataError: a file is missing or damaged, of another model, or (with another number of processes) of
            an optimizer whose state is not sharded as the weights are.
    """
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    writers = [process] if num_saved == num_now else range(num_saved)
    files = [folder / process_file(OPTIMIZER, writer) for writer in writers]
    trees = _overlapping(files, lambda tree: tree["state"], params)
    state: dict[int, dict[str, Any]] = {}
    # State that is not sharded (step counts) is the same in every file: the first will do.
    for index, values in trees[0]["state"].items():
        if index not in params:
            raise DataError(f"{folder} is of an optimizer with more parameters than {len(params)}")
        state[index] = {}
        for name, value in values.items():
            where = f"{folder}: {name} of parameter {index}"
            stored = [tree["state"][index][name] for tree in trees]
            if isinstance(value, Shard):
                value = _like(params[index], _assemble(where, stored, params[index]))
            elif isinstance(value, Tensor) and value.numel() > 1 and num_saved != num_now:
                raise DataError(
                    f"{where} is not divided as the weights are: resume with {num_saved} processes"
                )
            state[index][name] = value
    optimizer.load_state_dict({"state": state, "param_groups": trees[0]["param_groups"]})
    return trees[0]["others"]


def shard_of(value: Any) -> Any:
    """This process's `Shard` of a DTensor; any other value unchanged."""
    if not isinstance(value, DTensor):
        return value
    size, start = _region(value)
    return Shard(local(value), tuple(value.shape), start, size)


def local(value: Tensor) -> Tensor:
    """The local tensor of a DTensor, detached."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _region(value: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's shard."""
    size, start = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return tuple(size), tuple(start)


def _weights(model: nn.Module, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights and saved buffers by name, tied ones once."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        # Tied weights are one parameter under two names.
        if id(value) not in seen and (value.requires_grad or not trained_only):
            seen.add(id(value))
            yield name, value


def _overlapping(
    files: list[Path], shards_in: Callable[[Any], dict[Any, Any]], targets: Mapping[Any, Tensor]
) -> list[Any]:
    """Trees of the files whose shards overlap with the targets, and of the first file.

    Args:
        shards_in: gives the shards in a tree, by the keys of the targets.
    """
    trees: list[Any] = []
    for path in files:
        # Values only where they are needed: the header says which shards a file holds.
        shards = shards_in(load_tree(path, shard_values=False)).items() if trees else ()
        if not trees or any(_overlaps(value, targets.get(key)) for key, value in shards):
            trees.append(load_tree(path))
    return trees


def _overlaps(stored: Any, target: Tensor | None) -> bool:
    shards: Iterable[Any] = stored.values() if isinstance(stored, dict) else [stored]
    return isinstance(target, DTensor) and any(
        isinstance(each, Shard) and _overlap(each, *_region(target)) is not None for each in shards
    )


def _overlap(
    shard: Shard, size: tuple[int, ...], start: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Slices of the elements that a shard and a region have in common: (in the shard, in the region)."""
    source, target = [], []
    for b, n, s, m in zip(shard.start, shard.size, start, size, strict=True):
        first, last = max(b, s), min(b + n, s + m)
        if first >= last:
            return None
        source.append(slice(first - b, last - b))
        target.append(slice(first - s, last - s))
    return tuple(source), tuple(target)


def _assemble(where: str, stored: list[Any], target: Tensor) -> Tensor:
    """This process's local values of a target, from the stored shards that overlap with it."""
    if not isinstance(target, DTensor):
        if not stored or not isinstance(stored[0], Tensor) or stored[0].shape != target.shape:
            raise DataError(f"{where} is missing, or of another model")
        return stored[0]
    size, start = _region(target)
    shards = [each for each in stored if isinstance(each, Shard)]
    if not shards or shards[0].shape != tuple(target.shape):
        raise DataError(f"{where} is missing, or of another model: expected {tuple(target.shape)}")
    assert shards[0].values is not None
    if (shards[0].size, shards[0].start) == (size, start):
        return shards[0].values
    values = torch.empty(size, dtype=shards[0].values.dtype)
    covered = torch.zeros(size, dtype=torch.bool)
    for shard in shards:
        common = _overlap(shard, size, start)
        if common is not None and shard.values is not None:
            source, local_part = common
            values[local_part] = shard.values[source]
            covered[local_part] = True
    if not bool(covered.all()):
        raise DataError(f"{where} is incomplete: the checkpoint lacks a part of it")
    return values


def _like(param: Tensor, values: Tensor) -> Tensor:
    """Values as a DTensor with the placements of the parameter."""
    if not isinstance(param, DTensor):
        return values
    return DTensor.from_local(
        values.to(param.device),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
