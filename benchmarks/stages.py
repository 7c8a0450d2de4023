"""Seconds of each stage of a trainer's step, told through a pipe: what an arm of bench_real runs with."""

import hashlib
import json
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from benchmarks.measuring import forget_peak, status_mib

WARMUP = 1
"""Steps before the measured ones."""
STRIDE = 101
"""Every so many elements of the gradient are compared: a million of them on SmolLM2."""


class Stages(TrainerCallback):
    """Process seconds of each stage of a step; waits for its turn before every step, and reports after it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._seconds, self._sampled = pipe, {}, ""
        self.gradient: torch.Tensor | None = None

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its process seconds added to a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - began
                self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

        return run

    def sampled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take note of the prompts and completions of a batch."""
        # The prompts too: a small model's completions may hardly depend on them.
        parts = [(batch[f"{part}_ids"], batch[f"{part}_mask"]) for part in ("prompt", "completion")]
        rows = [
            [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)]
            for ids, mask in parts
        ]
        self._sampled = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self._tokens = int(parts[1][1].sum())
        return batch

    def on_step_begin(self, args, state, control, **kwargs):
        self._pipe.recv()
        if state.global_step == WARMUP:
            forget_peak()
        set_seed(0)
        self._seconds = {}
        self._began = time.process_time()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            self.gradient = torch.cat([grad[::STRIDE].float() for grad in grads])
        self._paused = time.process_time()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._seconds["optimizer"] = time.process_time() - self._paused

    def on_step_end(self, args, state, control, **kwargs):
        found = self._seconds | {"step": time.process_time() - self._began}
        found["update"] = found["step"] - found["sample"] - found["optimizer"]
        about = {"sampled": self._sampled, "tokens": self._tokens, "peak_mib": status_mib("VmHWM")}
        gradient = self.gradient.numpy() if state.global_step == 1 else None
        self._pipe.send({"seconds": found, "gradient": gradient} | about)
