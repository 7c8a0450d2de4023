"""What a CPU computes an arm with: threads and number format."""

import os
import time

import torch

from taopd.experiments.pool import THREADS

MANY_PARAMETERS = 10_000_000
"""A student from this size on computes faster on several CPU threads."""
_WORTH_IT = 1.3
"""How much faster a matrix product must be in bfloat16; below it the casts eat the gain."""


def num_threads(num_parameters: int) -> int:
    """CPU threads of an arm's model."""
    if torch.cuda.is_available():
        return torch.get_num_threads()
    # A tiny model is slower on several, and its results must not depend on how many arms run at a time.
    return int(os.environ.get(THREADS, 1)) if num_parameters >= MANY_PARAMETERS else 1


def use_bf16(num_parameters: int) -> bool:
    """Whether an arm's model computes in bfloat16: on a GPU, and a large one on a CPU that is faster so."""
    if torch.cuda.is_available():
        return True
    return num_parameters >= MANY_PARAMETERS and bf16_speedup() >= _WORTH_IT


def bf16_speedup() -> float:
    """How much faster this CPU multiplies matrices in bfloat16 than in float32; measured in 50 ms.

    torch does not say whether a CPU has instructions for it, and one without is many times slower.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(size, dtype=dtype) for size in ((256, 576), (576, 1536)))
        times = []
        for _ in range(6):  # the first is warming up
            began = time.thread_time()
            a @ b
            times.append(time.thread_time() - began)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / max(seconds[torch.bfloat16], 1e-9)
