"""bench_select: tokens per second from two top-K lists to the kept set, on one CPU thread.

Measures `topk_lists_signals` plus `select` on one rollout batch (8 responses of 2,048 tokens,
K = 16), the part of a step that runs between scoring and the loss. Not measured: the models, and
moving lists between ranks. Memory-bound on float64 columns of the batch.

A slow oracle in plain Python checks the same code on a slice of the same input first; if it
disagrees, no time is printed.

Run: python -m benchmarks.bench_select
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.measuring import call_seconds, versions
from taopd.cli import positive
from taopd.selectors import select
from taopd.signals import SignalTable, list_metrics, signal_table, topk_lists_signals

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from oracle_lists import scores as oracle_scores
from oracle_lists import select as oracle_select
from oracle_lists import token_metrics as oracle_metrics

from scripts.arguments import Arguments

NUM_WARMUP = 3
CHECKED_TOKENS = 128
BUDGET = 0.05


def make_lists(num_tokens: int, k: int) -> tuple[torch.Tensor, ...]:
    """Student and teacher lists over 2.5 K shared ids per position, best first."""
    generator = torch.Generator().manual_seed(0)
    width = 5 * k // 2
    ids = torch.randint(0, 150_000, (num_tokens, 1), generator=generator) + torch.arange(width)
    student = 3.0 * torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    teacher = student + 2.0 * torch.randn(num_tokens, width, generator=generator).double()
    lists: list[torch.Tensor] = []
    for logits in (student, teacher):
        best = logits.log_softmax(-1).topk(k, dim=-1)
        lists += [ids.gather(1, best.indices), best.values]
    return tuple(lists)


def table_for(lists: tuple[torch.Tensor, ...], num_responses: int, k: int) -> SignalTable:
    """Signals of all positions in one table; every twentieth position is masked out."""
    rows = torch.arange(lists[0].shape[0])
    length = lists[0].shape[0] // num_responses
    return signal_table(
        topk_lists_signals(*lists, k=k),
        completion=rows // length,
        position=rows % length,
        valid=rows % 20 != 19,
    )


def check(lists: tuple[torch.Tensor, ...], k: int) -> float:
    """Compare a slice with the oracle; the largest relative error of D, C and H."""
    lists = tuple(column[:CHECKED_TOKENS] for column in lists)
    student_ids, student_logprobs, teacher_ids, teacher_logprobs = (x.tolist() for x in lists)
    rows = [
        oracle_metrics(
            list(zip(student_logprobs[row], student_ids[row], strict=True)),
            list(zip(teacher_logprobs[row], teacher_ids[row], strict=True)),
            k,
        )
        for row in range(CHECKED_TOKENS)
    ]
    metrics = list_metrics(*lists, k=k)
    columns = {
        "KLf_union": metrics.disagreement,
        "Cmass": metrics.compatibility,
        "Hs_topk_norm": metrics.student_entropy,
    }
    worst = 0.0
    for name, ours in columns.items():
        truth = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        assert truth.norm() > 0, "vacuous"
        worst = max(worst, float(((ours - truth).abs() / truth.abs().clamp(min=1e-6)).max()))
    if worst > 1e-9:
        raise SystemExit(
            f"FAILED: relative error {worst:.1e} against the oracle, no time is printed"
        )
    table = table_for(lists, 2, k)
    scored = oracle_scores(*([row[name] for row in rows] for name in columns))
    expected = oracle_select(
        scored,
        "dlearn_high",
        BUDGET,
        0,
        table.completion.tolist(),
        table.position.tolist(),
        table.valid.tolist(),
    )
    kept = select(table, selector="teachability", budget=BUDGET, rules="reference").kept.tolist()
    if kept != expected:
        raise SystemExit("FAILED: kept set differs from the oracle's, no time is printed")
    return worst


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=2048)
    parser.add_argument("--k", type=positive, default=16)
    parser.add_argument("--repeats", type=positive, default=30)
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    if settings.tiny:
        settings.responses, settings.length, settings.repeats = 2, 128, 3
    torch.set_num_threads(1)
    num_tokens = settings.responses * settings.length
    lists = make_lists(num_tokens, settings.k)
    error = check(lists, settings.k)
    table = table_for(lists, settings.responses, settings.k)
    cases = {
        "topk_lists_signals": lambda: topk_lists_signals(*lists, k=settings.k),
        "select": lambda: select(table, budget=BUDGET, min_keep=1),
        "both": lambda: select(
            table_for(lists, settings.responses, settings.k), budget=BUDGET, min_keep=1
        ),
    }
    rows = []
    print(f"{'case':<20} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'tokens/s':>12}")
    for name, function in cases.items():
        times = call_seconds(function, warmup=NUM_WARMUP, repeats=settings.repeats)
        p50 = 1e3 * statistics.median(times)
        row = {
            "case": name,
            "p20_ms": 1e3 * times[len(times) // 5],
            "p50_ms": p50,
            "p80_ms": 1e3 * times[(4 * len(times)) // 5],
            "tokens_per_second": num_tokens / (p50 / 1e3),
        }
        rows.append(row)
        print(
            f"{name:<20} {row['p20_ms']:9.2f} {p50:9.2f} {row['p80_ms']:9.2f} "
            f"{row['tokens_per_second']:12,.0f}"
        )
    document = {
        "name": "bench_select",
        "num_tokens": num_tokens,
        "k": settings.k,
        "repeats": settings.repeats,
        "max_rel_err": error,
        "rows": rows,
    } | versions()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
