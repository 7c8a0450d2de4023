"""Adds up metrics and seconds within one optimizer step."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator

LOSS_PARTS = "loss/selected_nats", "loss/anchor_nats"
"""Their denominators are those of all processes: each process has a part of the sum."""


class Recorder:
    """Sums values by name until `flush`; micro-batches of one step add to the same entry.

    Time spent in a nested `timed` block is not counted twice: the outer block loses it.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def add(self, name: str, value: float) -> None:
        """Add to the entry of this step."""
        self._values[name] += float(value)

    def add_all(self, values: Mapping[str, float]) -> None:
        """`add` every value."""
        for name, value in values.items():
            self._values[name] += float(value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block, less those of the blocks inside it."""
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            # Nested blocks (the anchor within the selection) would be counted twice.
            self.add(name, seconds - self._inner.pop())
            if self._inner:
                self._inner[-1] += seconds

    def flush(self) -> dict[str, float]:
        """Return the sums of the step and start the next one."""
        values = dict(self._values)
        self._values.clear()
        return values


def over_processes(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step with `LOSS_PARTS` summed over processes, each of which must call this."""
    if accelerator.num_processes == 1:
        return dict(values)
    # Of one length everywhere: a process whose loss was bad has no part.
    own = [values.get(name, 0.0) for name in LOSS_PARTS]
    parts = torch.tensor(own, dtype=torch.float64, device=accelerator.device)
    sums = accelerator.reduce(parts, reduction="sum").tolist()
    summed = zip(LOSS_PARTS, sums, strict=True)
    return dict(values) | {name: value for name, value in summed if name in values}
