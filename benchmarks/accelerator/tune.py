"""Times of the Triton kernel for several tile shapes, to choose the constants of `taopd.kernels.fused`.

`python -m benchmarks.accelerator.tune`; the head of Qwen3-4B in bfloat16, 8,192 positions.
"""

import itertools
import json
import statistics

import torch

from benchmarks.accelerator.measure import milliseconds
from scripts.arguments import Arguments
from taopd.kernels import fused, topk_score

SHAPES = (
    *itertools.product(((64, 128, 64), (128, 128, 64)), (4, 8), (3,)),
    *itertools.product(((64, 256, 64), (128, 256, 64)), (8,), (3,)),
    ((128, 128, 64), 8, 4),
    ((64, 64, 64), 4, 4),
    ((64, 128, 128), 8, 2),
)


def main() -> None:
    hidden = torch.randn(8192, 2560, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151_936, 2560, device="cuda", dtype=torch.bfloat16) * (2 / 2560**0.5)
    targets = torch.zeros(8192, dtype=torch.long, device="cuda")
    found = []
    for blocks, warps, stages in SHAPES:
        fused.BLOCK_N, fused.WIDE_BLOCK_V, fused.BLOCK_D = blocks
        fused.NUM_WARPS, fused.NUM_STAGES = warps, stages
        row = {"blocks": blocks, "warps": warps, "stages": stages}

        def call() -> object:
            return topk_score(hidden, weight, targets, k=16, impl="triton")

        try:
            milliseconds(call)
            row["ms"] = statistics.median(milliseconds(call) for _ in range(3))
        except Exception as error:  # Too much shared memory, or a shape that does not compile.
            row["failed"] = f"{type(error).__name__}: {str(error)[:80]}"
        found.append(row)
        print(json.dumps(row), flush=True)
    print(json.dumps({"rows": found}))


if __name__ == "__main__":
    Arguments(description=__doc__).parse_args()
    main()
