"""What a run writes while it trains: metrics, and the size of every update."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class MetricsWriter(TrainerCallback):
    """Appends every log to `<output_dir>/metrics.jsonl`, one JSON object per line, non-finite as null.

    A resumed run keeps the lines up to the checkpoint it resumes from and drops later ones, so that the
    file reads as if the run had never stopped.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step > 0 and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= state.global_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    # A line torn by a kill; everything after it is newer than the checkpoint.
                    break
        path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in logs.items()
        }
        with open(Path(args.output_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


class UpdateNorm(TrainerCallback):
    """Measures the L2 norm of each parameter update and hands it to `record(name, value)`.

    A mean over selected tokens multiplies the gradient by 1/budget and Adam hides it again; arms are only
    comparable when the step they really took is known. Holds one copy of the trainable weights between the
    clipping and the end of the optimizer step.
    """

    def __init__(self, record):
        self._record = record
        self._before: list[tuple[Tensor, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._before = [
            (parameter, parameter.detach().clone())
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def on_optimizer_step(self, args, state, control, **kwargs):
        total = 0.0
        with torch.no_grad():
            for parameter, before in self._before:
                norm = torch.linalg.vector_norm(parameter - before, dtype=torch.float32)
                total += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
        self._before = []
        self._record("update/norm", math.sqrt(total))
