"""What a run writes while it trains: metrics, the peak of memory, and the size of every update."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from taopd.distributed.sharding import full_tensor
from taopd.runs.bounded_log import BoundedLog
from taopd.trainer.checkpoint.fsdp import within_backward

KEPT_LOGS = 500
"""Newest entries of the trainer's own `state.log_history`: a run of a week would hold gigabytes of them, and
write them again with every checkpoint. The others too are in `metrics.jsonl`."""


class MetricsWriter(TrainerCallback):
    """Appends every log to `<output_dir>/metrics.jsonl`, one JSON object per line, non-finite as null.

    The file is bounded (`taopd.runs.bounded_log`); evaluations and the closing line stay in it.

    A resumed run keeps the lines up to the checkpoint it resumes from and drops later ones, so that the
    file reads as if the run had never stopped.
    """

    def __init__(self):
        self._log = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        log = self._open(args)
        # A run that starts anew keeps nothing, not even what was logged at step 0.
        log.rewind(state.global_step + 1 if state.global_step > 0 else 0)

    def _open(self, args):
        path = Path(args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._log = BoundedLog(path, stays=lambda line: "loss" not in line)
        return self._log

    def on_log(self, args, state, control, logs=None, **kwargs):
        del state.log_history[:-KEPT_LOGS]
        if not state.is_world_process_zero or not logs:
            return
        # Before training: an evaluation.
        (self._log or self._open(args)).append({"step": state.global_step} | logs)


class PeakMemory(TrainerCallback):
    """Hands the peak of memory so far to `record(name, value)`, in MiB, after every optimizer step.

    On a GPU what this rank's tensors took of it; without one the largest resident set of the process, with
    libraries, both models and whatever else it has done, where the system tells (Linux).
    """

    def __init__(self, record):
        self._record = record

    def on_step_end(self, args, state, control, **kwargs):
        if (peak := _peak_mib(args.device)) is not None:
            self._record("perf/peak_memory_mib", peak)


class ProcessTime(TrainerCallback):
    """Hands the CPU seconds of every optimizer step, of all threads, to `record(name, value)`.

    Runs that share a machine slow each other down: their wall times do not compare, these do. Not on a GPU,
    where the process waits most of the time.
    """

    def __init__(self, record):
        self._record, self._began = record, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cpu":
            self._record("perf/cpu_s", time.process_time() - self._began)


def _peak_mib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # Not getrusage: there a child begins with the peak of its parent.
    kib = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(kib[0]) / 2**10 if kib else None


class UpdateNorm(TrainerCallback):
    """Measures the L2 norm of each parameter update and hands it to `record(name, value)`.

    With a target every update is rescaled to that norm, weight decay included, after the optimizer has moved
    the weights; its own state does not know. An update of norm 0 stays 0. With `largest` only those above it.

    A mean over selected tokens multiplies the gradient by 1/budget and Adam hides it again; arms are only
    comparable when the step they really took is known. Holds one copy of the trainable weights between the
    clipping and the end of the optimizer step. Not for what updates within the backward (`within_backward`).
    """

    def __init__(self, record, target: float | None = None, largest: float | None = None):
        self._record = record
        self._target = target
        self._largest = math.inf if largest is None else largest
        self._before: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, args, accelerator, record):
        """The callback that the settings ask for, None where there is nothing to measure."""
        norms = args.match_update_norm, args.max_update_norm
        # No update can be measured within the backward.
        measured = not within_backward(args, accelerator)
        asked = args.log_update_norm or norms != (None, None)
        return cls(record, *norms) if asked and measured else None

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
                change = parameter - before
                wide = torch.promote_types(change.dtype, torch.float32)
                norm = torch.linalg.vector_norm(change, dtype=wide)
                total += float(full_tensor(norm)) ** 2
            norm = math.sqrt(total)
            goal = min(norm, self._largest) if self._target is None else self._target
            if norm > 0.0 and goal != norm:
                for parameter, before in self._before:
                    parameter.copy_(before + (parameter - before) * (goal / norm))
                self._record("update/scale", goal / norm)
        self._before = []
        self._record("update/norm", norm)
