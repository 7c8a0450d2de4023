"""Whether a resumed run has the initial student that it began with.

Method reach, the anchor, the guard and a teacher `self` compare with the student before training, which a
resumed trainer takes from the model that it is given. A checkpoint of the run in its place, or a folder that
was written over, would change the method and leave no trace.

A few weights of every parameter are kept in a checkpoint. Not a hash: merging an adapter or another dtype
moves a weight by a rounding, and is the same student.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback

from taopd.distributed.sharding import full_tensor
from taopd.errors import ConfigError

SAMPLES = 8
"""Weights of a parameter that are kept."""
SAME = 1e-2
"""Relative distance of the samples of a parameter up to which it is the same: bfloat16 rounds by 4e-3."""


def places(length: int) -> Int[Tensor, " n"]:
    """Up to `SAMPLES` places in a parameter of that length, evenly spaced, first and last among them."""
    count = min(SAMPLES, length)
    # In whole numbers: above 2^24 a float32 place may lie beyond the end.
    return torch.arange(count) * (length - 1) // max(1, count - 1)


@torch.no_grad()
def samples_of(student: nn.Module) -> Float[Tensor, "P 8"]:
    """Weights of every parameter, evenly spaced, float32 on the CPU; a shorter one is filled up with zeros.

    Left out is the random half of a LoRA that is still zero: it is drawn anew at every start, and changes
    nothing.
    """
    weights, rows = dict(student.named_parameters()), []
    for name, weight in weights.items():
        other = weights.get(name.replace("lora_A", "lora_B"))
        # Whole on every process: gathering is a collective where it is in parts.
        if "lora_A" in name and other is not None and not bool(full_tensor(other).any()):
            continue
        values = full_tensor(weight).detach().flatten()
        index = places(len(values))
        row = torch.zeros(SAMPLES)
        # On a process whose weights are sent later there are none yet.
        if not values.is_meta:
            row[: len(index)] = values[index.to(values.device)].float().cpu()
        rows.append(row)
    return torch.stack(rows)


def differ(before: Float[Tensor, "P 8"], now: Float[Tensor, "Q 8"]) -> bool:
    """Whether two samples are of models that differ by more than a rounding."""
    if now.shape != before.shape:
        return True
    distance = (now - before).norm(dim=1)
    return bool((distance > SAME * before.norm(dim=1)).any())


class SameStart(TrainerCallback):
    """Keeps samples of the initial student in checkpoints, and compares.

    Args:
        student: before training.
        needed: the run compares with it.
    """

    def __init__(self, student: nn.Module, accelerator: Accelerator, *, needed: bool) -> None:
        self._samples, self._accelerator, self._needed = samples_of(student), accelerator, needed
        # Asked for at every step.
        self._state = {"samples": self._samples.tolist()}

    def checkpoint_state(self) -> dict[str, Any]:
        """The samples."""
        return self._state

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ConfigError: the run began with another student; on every process.
        """
        answer = [differ(torch.tensor(state["samples"]), self._samples)]
        if self._accelerator.num_processes > 1:
            # The first process has the weights, whoever else has.
            broadcast_object_list(answer)
        if self._needed and answer[0]:
            raise ConfigError(
                "the student that was given is not the one that this run began with: method reach, the "
                "anchor, the collapse guard and a teacher 'self' compare with the student before training. "
                "Give the model of the first start (model_name_or_path, unchanged), and the checkpoint as "
                "resume_from_checkpoint alone; or begin a run of its own in another folder"
            )
