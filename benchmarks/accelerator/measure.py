"""Times and peak memory of calls on a GPU, and the two limits they are compared with."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from scripts.arguments import Arguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def toy_is_asked(description: str | None) -> bool:
    """Whether a stage was started with `--toy`, its only flag."""
    parser = Arguments(description=description)
    parser.add_argument("--toy", action="store_true", help="a small size for a CPU")
    return bool(parser.parse_args().toy)


def synchronize() -> None:
    """Wait for the GPU, so that a host clock can be read."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object]) -> float:
    """Time of one call, launch to end."""
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def measured(
    calls: Mapping[str, Callable[[], object]],
    leaves: Iterable[Tensor] = (),
    *,
    repeats: int,
    backward: bool = True,
) -> dict[str, dict[str, Any]]:
    """Times of every call, alternating, and its peak memory above what is there before it.

    Args:
        leaves: what gets gradients; they have buffers before a call, so that a peak leaves these out.
        backward: the calls return a loss, and its backward is part of the measurement.

    Returns:
        Name -> p50_ms, min_ms, max_ms, peak_mib (NaN on a CPU); or "failed": "out of memory".
    """
    leaves = list(leaves)
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    failed: set[str] = set()

    def run(call: Callable[[], object]) -> None:
        result = call()
        if backward:
            assert isinstance(result, Tensor)
            result.backward()

    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if name in failed:
                continue
            for leaf in leaves:
                leaf.grad = torch.zeros_like(leaf)
            try:
                if DEVICE == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                took = milliseconds(lambda call=call: run(call))
                if DEVICE == "cuda":
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            except torch.cuda.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
                continue
            if repeat:  # The first round compiles and fills caches.
                times[name].append(took)
    return {
        name: {"failed": "out of memory"}
        if name in failed
        else {
            "p50_ms": statistics.median(times[name]),
            "min_ms": min(times[name]),
            "max_ms": max(times[name]),
            "peak_mib": peaks.get(name, float("nan")),
        }
        for name in calls
    }


def limits(dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large matrix product in `dtype`, and GB/s of a large copy, on this machine."""
    size = 8192 if DEVICE == "cuda" else 512
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    b = torch.randn(size, size, device=DEVICE, dtype=dtype)
    product = statistics.median([milliseconds(lambda: a @ b) for _ in range(12)][2:])
    source = torch.randn(2**28 if DEVICE == "cuda" else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    copy = statistics.median([milliseconds(lambda: target.copy_(source)) for _ in range(12)][2:])
    return {
        "matmul_tflops": 2 * size**3 / product / 1e9,
        "copy_gbs": 2 * source.numel() * 4 / copy / 1e6,
    }
