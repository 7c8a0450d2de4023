"""The state of an FSDP2 run as safetensors, one file a process: no pickle, no gathering, to the bit.

Why not accelerate's formats: the whole ones gather everything on one process and pickle it, the distributed
one (torch's) pickles its index. Here a process writes the blocks that it holds, each with the shape of its
tensor and the place where it begins. Reading needs no communication either, and takes any number of
processes: a process reads the blocks that overlap with its own, so that a run that lost a machine goes on.

    shard-R.safetensors        weights and buffers of process R
    optimizer-R.safetensors    its optimizer's state; schedule and fp16 scaler, which are the same on all
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

from taopd.errors import ConfigError, DataError
from taopd.runs.checkpoints import Layout, process_file
from taopd.trainer.checkpoint.state_file import Block, load_tree, save_tree

WEIGHTS, OPTIMIZER = "shard", "optimizer"
_LAYOUTS: dict[DistributedType, Layout] = {
    DistributedType.FSDP: "sharded",
    DistributedType.DEEPSPEED: "deepspeed",
}


def layout_of(accelerator: Accelerator) -> Layout:
    """How the state of a run is divided over its processes.

    Raises:
        ConfigError: by version 1 of FSDP, whose flattened parameters nothing here was tried with.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None
    if plugin is not None and plugin.fsdp_version == 1:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version: 2")
    return _LAYOUTS.get(accelerator.distributed_type, "replicated")


def save_weights(folder: Path, model: nn.Module, process: int, *, trained_only: bool) -> None:
    """Write what this process holds of the weights.

    Args:
        trained_only: leave out frozen weights, which come from the base model of an adapter.
    """
    held = {name: block_of(t) for name, t in _weights(model, trained_only=trained_only)}
    save_tree(folder / process_file(WEIGHTS, process), held)


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
    """Read this process's part of the weights.

    Args:
        num_saved: processes that wrote the checkpoint. num_now: those of this run.

    Raises:
        DataError: a file is missing or damaged, or of a model with other names or shapes.
    """
    targets = dict(_weights(model, trained_only=trained_only))
    files = _files(folder, WEIGHTS, process, num_saved, num_now)
    trees = _overlapping(files, lambda tree: tree, targets)
    for name, target in targets.items():
        found = [tree[name] for tree in trees if name in tree]
        values = _assemble(f"{folder}: {name}", found, target)
        local(target).copy_(values)


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, process: int, others: Mapping[str, Any]
) -> None:
    """Write what this process holds of the optimizer's state.

    Args:
        others: states that are the same on all processes (schedule, scaler).
    """
    state = optimizer.state_dict()
    held = {
        index: {name: block_of(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    tree = {"state": held, "param_groups": state["param_groups"], "others": dict(others)}
    save_tree(folder / process_file(OPTIMIZER, process), tree)


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, process: int, num_saved: int, num_now: int
) -> dict[str, Any]:
    """Read this process's part of the optimizer's state; return the other states.

    Raises:
        DataError: a file is missing or damaged, of another model, or (with another number of processes) of
            an optimizer whose state is not divided as the weights are.
    """
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    files = _files(folder, OPTIMIZER, process, num_saved, num_now)
    trees = _overlapping(files, lambda tree: tree["state"], params)
    state: dict[int, dict[str, Any]] = {}
    for index, values in trees[0]["state"].items():
        if index not in params:
            raise DataError(f"{folder} is of an optimizer with more parameters than {len(params)}")
        state[index] = {}
        for name, value in values.items():
            where = f"{folder}: {name} of parameter {index}"
            found = [tree["state"][index][name] for tree in trees]
            if isinstance(value, Block):
                value = _like(params[index], _assemble(where, found, params[index]))
            elif isinstance(value, Tensor) and value.numel() > 1 and num_saved != num_now:
                raise DataError(
                    f"{where} is not divided as the weights are: resume with {num_saved} processes"
                )
            state[index][name] = value
    optimizer.load_state_dict({"state": state, "param_groups": trees[0]["param_groups"]})
    return trees[0]["others"]


def block_of(value: Any) -> Any:
    """The part of a divided tensor that lies here as a `Block`; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    size, start = _place(value)
    return Block(local(value), tuple(value.shape), start, size)


def local(value: Tensor) -> Tensor:
    """The part that lies here, in its own memory."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _place(value: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and begin of this process's block."""
    size, start = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return tuple(size), tuple(start)


def _weights(model: nn.Module, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights and saved buffers by name, tied ones once."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen and (value.requires_grad or not trained_only):
            seen.add(id(value))
            yield name, value


def _files(folder: Path, kind: str, process: int, num_saved: int, num_now: int) -> list[Path]:
    own = [process] if num_saved == num_now else range(num_saved)
    return [folder / process_file(kind, number) for number in own]


def _overlapping(
    files: list[Path], blocks_in: Callable[[Any], dict[Any, Any]], targets: Mapping[Any, Tensor]
) -> list[Any]:
    """Trees of the files that hold something of the targets, the first one in any case.

    Args:
        blocks_in: finds the blocks in a tree, by the keys of the targets.
    """
    trees = []
    for path in files:
        if path is not files[0]:
            held = blocks_in(load_tree(path, blocks=False)).items()
            if not any(_any_common(value, targets.get(key)) for key, value in held):
                continue
        trees.append(load_tree(path))
    return trees


def _any_common(held: Any, target: Tensor | None) -> bool:
    blocks: Iterable[Any] = held.values() if isinstance(held, dict) else [held]
    return isinstance(target, DTensor) and any(
        isinstance(block, Block) and _common(block, *_place(target)) is not None for block in blocks
    )


def _common(
    block: Block, size: tuple[int, ...], start: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a block and the region of that size and start have elements in common: (there, here)."""
    there, here = [], []
    for b, n, s, m in zip(block.start, block.size, start, size, strict=True):
        first, last = max(b, s), min(b + n, s + m)
        if first >= last:
            return None
        there.append(slice(first - b, last - b))
        here.append(slice(first - s, last - s))
    return tuple(there), tuple(here)


def _assemble(where: str, found: list[Any], target: Tensor) -> Tensor:
    """This process's part of a target, from the blocks that hold it.

    Raises:
        DataError: another shape, or a part of it is in no block.
    """
    if not isinstance(target, DTensor):
        if not found or not isinstance(found[0], Tensor) or found[0].shape != target.shape:
            raise DataError(f"{where} is missing, or of another model")
        return found[0]
    size, start = _place(target)
    blocks = [each for each in found if isinstance(each, Block)]
    if not blocks or blocks[0].shape != tuple(target.shape):
        raise DataError(f"{where} is missing, or of another model: expected {tuple(target.shape)}")
    assert blocks[0].values is not None
    if (blocks[0].size, blocks[0].start) == (size, start):
        return blocks[0].values
    values = torch.empty(size, dtype=blocks[0].values.dtype)
    covered = torch.zeros(size, dtype=torch.bool)
    for block in blocks:
        common = _common(block, size, start)
        if common is not None and block.values is not None:
            there, here = common
            values[here] = block.values[there]
            covered[here] = True
    if not bool(covered.all()):
        raise DataError(f"{where} is incomplete: the checkpoint lacks a part of it")
    return values


def _like(param: Tensor, values: Tensor) -> Tensor:
    """Values as a divided tensor that lies as the parameter does."""
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
