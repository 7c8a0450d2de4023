"""One rank of `test_fsdp_window.py`: the windowed gradient of a sharded model against the same unsharded.

Run as: torchrun --nproc-per-node N fsdp_window_worker.py; prints the largest relative difference.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.distillation_trainer import _ForwardRedirection

from taopd.models.gradient_window import sparse_states

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from sparse_cases import make_family, padded_batch

from scripts.reliability.forked import leave

IDS, MASK, WANTED = padded_batch()


def gradients(*, sharded: bool) -> dict[str, torch.Tensor]:
    """Gradients through a window of 3, the model called within its wrapper's forward as the trainer does."""
    model = make_family("qwen3")
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def forward(ids):
        return sparse_states(model, ids, MASK, WANTED, window=3).hidden

    _ForwardRedirection()(model, model, forward, IDS).square().sum().backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    truth, found = gradients(sharded=False), gradients(sharded=True)
    assert truth.keys() == found.keys() and truth
    worst = max(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth)
    if dist.get_rank() == 0:
        print(worst)
    dist.barrier()  # A process that leaves first can take the connection from under the other.
    leave()
