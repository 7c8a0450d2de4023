"""bench_bank: memory and time of scoring a bank of the published size, above the models themselves.

Measures `score_rollouts` (both backbones, one projection per model and chunk, every feature for K = 8, 16,
32) on 300 completions of 192 tokens, a vocabulary of 151,936 ids and width 256, on one CPU thread. Not
measured: sampling, and backbones of a real depth (two layers here). Compute-bound in the projections.

Peak: the largest resident set of the process less the resident set with both models loaded.

Seen on two shared cores with other work on them: 426 MiB above the models, 23 minutes.

Run: python -m benchmarks.bench_bank [--tiny]
"""

import json
import time
from dataclasses import asdict, dataclass

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measuring import status_mib, versions
from scripts.arguments import Arguments
from taopd.cli import positive
from taopd.diagnose.bank import BANK_TOP_K, MAX_TOKENS, NUM_COMPLETIONS, Rollouts
from taopd.diagnose.bank.score import score_rollouts

LIMIT_MIB = 1536.0
"""Promised for the published size."""
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Size of a bank."""

    num_completions: int
    max_tokens: int
    vocab_size: int
    width: int
    batch_size: int = 8


PUBLISHED = Case(
    num_completions=NUM_COMPLETIONS, max_tokens=MAX_TOKENS, vocab_size=151_936, width=256
)
TINY = Case(num_completions=4, max_tokens=16, vocab_size=997, width=32)


def make_model(case: Case, seed: int) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=case.vocab_size,
        hidden_size=case.width,
        intermediate_size=2 * case.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(8, case.width // 4),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def make_rollouts(case: Case) -> Rollouts:
    """Random ids; every completion has the full length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0,
        case.vocab_size,
        (case.num_completions, PROMPT_TOKENS + case.max_tokens),
        generator=generator,
    ).tolist()
    return Rollouts(
        prompt_ids=[row[:PROMPT_TOKENS] for row in ids],
        completion_ids=[row[PROMPT_TOKENS:] for row in ids],
    )


def measure(case: Case) -> dict[str, float]:
    """Peak MiB above the models, seconds, and what the run came to."""
    student, teacher = make_model(case, 0), make_model(case, 1)
    rollouts = make_rollouts(case)
    settings = {
        "vocab_size": case.vocab_size,
        "k": list(BANK_TOP_K),
        "temperature": 1.0,
        "batch_size": case.batch_size,
    }
    before = status_mib("VmRSS")
    started = time.perf_counter()
    columns, _ = score_rollouts(student, teacher, rollouts, settings, None)
    seconds = time.perf_counter() - started
    peak = status_mib("VmHWM")
    return {
        "positions": len(columns["token_id"]),
        "models_mib": before,
        "peak_above_models_mib": peak - before,
        "seconds": seconds,
        "mean_forward_kl_nats": float(columns["forward_kl"].mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    parser.add_argument("--completions", type=positive, help="fewer completions than published")
    parser.add_argument("--vocab-size", type=positive)
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = asdict(TINY if settings.tiny else PUBLISHED)
    if settings.completions:
        case["num_completions"] = settings.completions
    if settings.vocab_size:
        case["vocab_size"] = settings.vocab_size
    row = measure(Case(**case))
    for name, value in row.items():
        print(f"{name:<24} {value:12,.2f}")
    document = {
        "name": "bench_bank",
        **case,
        **row,
        "limit_mib": LIMIT_MIB,
        "within_limit": row["peak_above_models_mib"] <= LIMIT_MIB,
    } | versions()
    print(json.dumps(document))
    return 0 if document["within_limit"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
