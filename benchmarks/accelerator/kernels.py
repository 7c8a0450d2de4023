"""Stage 1: the tests marked `gpu`, and both scoring implementations against float64 at a real head's size."""

import json
import re
import subprocess
import sys

import torch

from benchmarks.accelerator.measure import DEVICE, limits, measured, toy_is_asked
from taopd.kernels import Head, reference, topk_score

NUM_CHECKED = 32


def run_tests() -> dict[str, object]:
    """Outcome of `pytest -m gpu`: counts, and the names of what failed."""
    files = ["tests/kernels", "tests/e2e/test_trainer_on_a_gpu.py"]  # Collecting all takes longer.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:])
    closing = [line for line in done.stdout.splitlines() if line.strip()][-1]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"status": done.returncode, "closing_line": closing, "failed": failed}


def run_kernels(*, toy: bool) -> list[dict[str, object]]:
    """Error, time, peak memory and share of the matmul limit: one row per dtype and implementation."""
    rows, vocab, width = (64, 1009, 32) if toy else (8192, 151_936, 2048)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        limit = limits(dtype)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, width, generator=generator).to(DEVICE, dtype)
        weight = (2 * torch.randn(vocab, width, generator=generator) / width**0.5).to(DEVICE, dtype)
        targets = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
        few = slice(0, NUM_CHECKED)
        truth = reference.topk_score(
            hidden[few].double(), Head(weight=weight.double()), targets[few], k=16
        )
        for impl in ("chunked", "triton"):
            if impl == "triton" and DEVICE != "cuda":
                continue

            def score(
                at: slice = slice(None), impl=impl, inputs=(hidden, weight, targets)
            ) -> object:
                states, head, tokens = inputs
                return topk_score(states[at], head, tokens[at], k=16, impl=impl)

            scores = score(few)
            errors = {
                name: float((getattr(scores, name).double() - getattr(truth, name)).abs().max())
                for name in ("target_logprobs", "topk_logprobs", "logsumexp", "entropy")
            }
            row = measured({impl: score}, repeats=2 if toy else 5, backward=False)[impl]
            row |= {"impl": impl, "dtype": str(dtype).removeprefix("torch."), "max_error": errors}
            if "p50_ms" in row:
                rate = 2 * rows * vocab * width / row["p50_ms"] / 1e9
                row |= {"tflops": rate, "of_matmul_limit": rate / limit["matmul_tflops"]}
            found.append(row | {"limits": limit})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    toy = toy_is_asked(__doc__)
    document = {
        "tests": run_tests() if not toy else {},
        "rows": run_kernels(toy=toy),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
