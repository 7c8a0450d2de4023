"""bench_topk_score: top-K, log-sum-exp and entropy of positions from hidden states and a head; one thread.

Measures `topk_score` (K = 16, float32) in tiles of several sizes against plain torch: blocks of positions
times the whole vocabulary, log_softmax, topk and a sum. `matmul` is the projection alone in small tiles, the
floor of all of them. Compute-bound at width 256 and more, bound by passes over the logits below.
Not measured: the backbone, the loss, `triton` (it needs a GPU), `reference` on large cases (it sorts).

The result is compared with float64 on some of the positions first; a row that disagrees is marked FAILED
and has no time. Times alternate between the rows; peak memory comes from a process of its own.

Run: python -m benchmarks.bench_topk_score [--case head-heavy-64 ...] [--repeats 5] [--tiny]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.measuring import RETURN_BLOCKS, forget_peak, last_line, status_mib, versions
from scripts.arguments import Arguments
from taopd.cli import positive
from taopd.kernels import Head, TopKScores, chunked, reference

K = 16
NUM_CHECKED = 8
TOLERANCE = 1e-4
PLAIN_ELEMENTS = 2**24
"""Logits that plain torch holds at a time, as the first slice of this package did."""


@dataclass(frozen=True)
class Case:
    """A shape: positions, vocabulary, width."""

    num_rows: int
    vocab_size: int
    width: int


CASES = {
    "head-heavy-64": Case(512, 151_936, 64),
    "head-heavy-256": Case(512, 151_936, 256),
    "balanced": Case(1024, 16_384, 512),
    "tiny": Case(64, 997, 32),
    **{f"linear-{num // 1024}k": Case(num, 8192, 32) for num in (1024, 4096, 16_384, 32_768)},
}
TILES = [(21, 14), (20, 13), (20, 14), (22, 14), (21, 15), (18, 12)]


def inputs(case: Case) -> tuple[Tensor, Head, Tensor]:
    """Seeded states, head and targets; logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.num_rows, case.width, generator=generator)
    weight = 2 * case.width**-0.5 * torch.randn(case.vocab_size, case.width, generator=generator)
    targets = torch.randint(case.vocab_size, (case.num_rows,), generator=generator)
    return hidden, Head(weight=weight), targets


def plain(hidden: Tensor, head: Head, targets: Tensor, elements: int) -> TopKScores:
    """What one would write first: whole rows of log-probs, `elements` logits at a time."""
    size = max(1, elements // head.vocab_size)
    parts = []
    for start in range(0, len(hidden), size):
        logits = hidden[start : start + size] @ head.weight.T
        logsumexp = logits.logsumexp(-1)
        logprobs = logits - logsumexp.unsqueeze(1)
        top = logprobs.topk(K, dim=-1)
        target = logprobs.gather(1, targets[start : start + size, None]).squeeze(1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        parts.append(TopKScores(target, top.values, top.indices, logsumexp, entropy))
    return TopKScores(
        *(torch.cat(columns) for columns in zip(*(p[:5] for p in parts), strict=True))
    )


def matmul(hidden: Tensor, head: Head, targets: Tensor) -> None:
    """The projection alone, in tiles that stay in cache."""
    for column in range(0, head.vocab_size, 4096):
        for row in range(0, len(hidden), 128):
            _ = hidden[row : row + 128] @ head.weight[column : column + 4096].T


def implementations(case: Case, tiny: bool) -> dict[str, Callable]:
    """Name -> function (hidden, head, targets)."""

    def in_tiles(tile: chunked.Tile) -> Callable:
        return lambda *x: chunked.topk_score(*x, k=K, tile=tile)

    found: dict[str, Callable] = {
        "matmul": matmul,
        "plain-rows": lambda *x: plain(*x, PLAIN_ELEMENTS),
    }
    if case.num_rows * case.vocab_size <= 2**27:
        found["plain-full"] = lambda *x: plain(*x, 2**62)
    if tiny:
        found["reference"] = lambda *x: reference.topk_score(*x, k=K)
    for elements, columns in TILES:
        found[f"chunked-2^{elements}/2^{columns}"] = in_tiles(chunked.Tile(2**elements, 2**columns))
    return found


def error_of(function: Callable, arguments: tuple[Tensor, Head, Tensor]) -> float:
    """Largest absolute error of the first positions against float64, nats; inf where ids differ."""
    hidden, head, targets = arguments
    rows = slice(NUM_CHECKED)
    found = function(*arguments)
    truth = reference.topk_score(
        hidden[rows].double(), head.cast(torch.float64), targets[rows], k=K
    )
    assert truth.topk_logprobs.norm() > 0, "vacuous"
    if not torch.equal(found.topk_ids[rows], truth.topk_ids):
        return float("inf")
    names = ("target_logprobs", "topk_logprobs", "logsumexp", "entropy")
    return max(
        float((getattr(found, name)[rows] - getattr(truth, name)).abs().max()) for name in names
    )


def measure_peak(case_name: str, impl: str) -> None:
    """Print the extra peak memory of one call, MiB; run in a process of its own."""
    case = CASES[case_name]
    arguments = inputs(case)
    function = implementations(case, case_name == "tiny")[impl]
    hidden, head, targets = arguments
    function(hidden[:16], head.tile(0, 64), targets[:16] % 64)  # load what a first call loads
    forget_peak()  # of making the inputs
    before = status_mib("VmHWM")
    function(*arguments)
    print(status_mib("VmHWM") - before)


def peak_of(case_name: str, impl: str) -> float:
    """`measure_peak` in a process of its own."""
    arguments = ("benchmarks.bench_topk_score", "--peak", case_name, impl)
    return float(last_line(*arguments, environment=RETURN_BLOCKS))


def run_case(name: str, repeats: int, only: str) -> list[dict]:
    """Rows of one case: gate, alternating times, peak."""
    case = CASES[name]
    arguments = inputs(case)
    functions = {
        impl: function
        for impl, function in implementations(case, name == "tiny").items()
        if only in impl
    }
    errors = {
        impl: 0.0 if impl == "matmul" else error_of(function, arguments)
        for impl, function in functions.items()
    }
    times: dict[str, list[float]] = {impl: [] for impl in functions if errors[impl] <= TOLERANCE}
    for _ in range(repeats):
        for impl in times:
            start = time.perf_counter()
            functions[impl](*arguments)
            times[impl].append(1e3 * (time.perf_counter() - start))
    rows = []
    for impl in functions:
        row = {"case": name, **asdict(case), "k": K, "impl": impl, "max_abs_err": errors[impl]}
        if impl in times:
            fastest = min(times[impl])
            row |= {
                "min_ms": fastest,
                "p50_ms": statistics.median(times[impl]),
                "max_ms": max(times[impl]),
                "ns_per_logit": 1e6 * fastest / (case.num_rows * case.vocab_size),
                "peak_mib": peak_of(name, impl),
            }
            print(
                f"{name:<16} {impl:<20} {fastest:10.1f} {row['p50_ms']:10.1f} {row['max_ms']:10.1f} "
                f"{row['ns_per_logit']:9.2f} {row['peak_mib']:9.1f} {errors[impl]:9.1e}"
            )
        else:
            print(f"{name:<16} {impl:<20} FAILED: error {errors[impl]:.1e}, no time is printed")
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print a table, and one JSON document as the last line."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--impl", default="", help="only implementations whose name contains this")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if settings.peak:
        measure_peak(*settings.peak)
        return 0
    names = ["tiny"] if settings.tiny else settings.case
    columns = ("case", "impl", "min ms", "p50 ms", "max ms", "ns/logit", "peak MiB", "error")
    print("{:<16} {:<20} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}".format(*columns))
    rows = [row for name in names for row in run_case(name, settings.repeats, settings.impl)]
    document = {
        "name": "bench_topk_score",
        "repeats": settings.repeats,
        "rows": rows,
        "failed": any("min_ms" not in row for row in rows),
    } | versions()
    print(json.dumps(document))
    return int(document["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
