"""bench_teacher: what asking a teacher behind a server costs beyond the server's own time.

A real vLLM on the CPU serves a random Qwen3; 64 sequences are scored, with its 16 best at every token.
  raw       the same requests at once from a bare HTTP client that drops the answers: the server's own time
  score     `VllmTeacher.score`: the same, with answers read, checked and made into tensors
  student   the student's forward and scores of the same sequences, eight micro-batches, no teacher
  step      `score_remote`: student and teacher together, a micro-batch asked for while the next one runs
Target: score at most 1.3 times raw. Without overlap, step is student + score.

Checked before anything is timed: the server's numbers are the model's own, to 1e-4.
Needs the environment that `make test-vllm` makes; without it nothing is measured, and the output says so. The
server has one core, this process another.

Run: python -m benchmarks.bench_teacher [--tiny]
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measuring import versions
from benchmarks.vllm_server import VllmServer, python
from scripts.arguments import Arguments
from taopd.kernels import topk_score
from taopd.models.batch import Positions
from taopd.models.forward import states_at
from taopd.models.output_head import read_head
from taopd.teachers import LocalTeacher, connect, score_remote

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    width: int
    layers: int
    vocab: int
    prompt: int
    completion: int
    sequences: int
    repeats: int
    k: int = 16
    concurrency: int = 32


CASES = {
    "tiny": Case("tiny", 64, 1, 500, 8, 16, 8, 2),
    "balanced": Case("balanced", 256, 8, 8000, 64, 192, 64, 7),
}


def make_model(case: Case, folder: Path, seed: int) -> Qwen3ForCausalLM:
    """A random model with a tokenizer of as many words, saved; heads of 32 for vLLM's attention."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 32,
        num_key_value_heads=max(1, case.width // 64),
        head_dim=32,
        max_position_embeddings=512,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.lm_head.weight.data *= 20.0  # Else every distribution is flat, and lists are ties.
    words = {f"w{index}": index for index in range(case.vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="w1", unk_token="w0"
    ).save_pretrained(folder)
    return model


class Work:
    """Sequences, a student, a teacher here and the same one behind a server."""

    def __init__(
        self, case: Case, url: str, teacher: Qwen3ForCausalLM, student: Qwen3ForCausalLM
    ) -> None:
        self.case, self.url, self.local, self.student = case, url, teacher, student
        generator = torch.Generator().manual_seed(0)
        shape = (case.sequences, case.prompt + case.completion)
        ids = torch.randint(2, case.vocab, shape, generator=generator)
        self.sequences, self.starts = ids.tolist(), [case.prompt] * case.sequences
        prompt, completion = ids[:, : case.prompt], ids[:, case.prompt :]
        self.batch = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt)}
        self.batch |= {"completion_ids": completion, "completion_mask": torch.ones_like(completion)}
        self.positions = Positions.of(torch.ones_like(completion, dtype=torch.bool))
        self.size = case.sequences // 8
        options = {"vocab_size": case.vocab, "top_k": case.k, "concurrency": case.concurrency}
        self.teacher: Any = connect(url, **options)
        self.bodies = [
            self.teacher._request(tokens, case.prompt, None, case.k) for tokens in self.sequences
        ]

    def check(self) -> float:
        """Largest difference of the server's numbers from the model's own, nats."""
        found = self.score()
        truth = LocalTeacher(self.local, self.case.vocab).score(
            self.sequences, self.starts, None, self.case.k
        )
        error = max(
            float((found.logprobs - truth.logprobs).abs().max()),
            float((found.topk_logprobs - truth.topk_logprobs).abs().max()),
        )
        if error > TOLERANCE:
            raise SystemExit(f"FAILED: the server differs by {error:.1e} nats; no time is printed")
        return error

    def raw(self) -> None:
        """The same requests; answers are received whole and dropped."""

        async def send() -> None:
            limits = httpx.Limits(max_connections=self.case.concurrency)
            async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
                calls = [client.post(self.url + path, json=body) for path, body in self.bodies]
                for answer in await asyncio.gather(*calls):
                    answer.raise_for_status()

        asyncio.run(send())

    def score(self) -> Any:
        return self.teacher.score(self.sequences, self.starts, None, self.case.k)

    def forward(self, model: Any, part: Any) -> Any:
        hidden = model.base_model(
            input_ids=part.input_ids, attention_mask=part.attention_mask
        ).last_hidden_state
        return hidden[:, -part.num_completion - 1 : -1], read_head(model, self.case.vocab)

    def alone(self) -> None:
        """The student's part of a step."""
        targets = self.batch["completion_ids"].split(self.size)
        states = states_at(self.forward, self.student, self.batch, self.positions, self.size)
        for ids, (hidden, head) in zip(targets, states, strict=True):
            topk_score(hidden, head, ids.flatten(), k=self.case.k)

    def step(self) -> None:
        score_remote(
            self.forward,
            self.student,
            self.teacher,
            self.batch,
            self.positions,
            micro_batch_size=self.size,
            vocab_size=self.case.vocab,
            k=self.case.k,
            when="",
        )


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, alternating, after one round of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return times


@torch.no_grad()
def measure(case: Case, folder: Path) -> dict[str, Any]:
    teacher = make_model(case, folder / "teacher", 0)
    student = make_model(case, folder / "student", 1)
    length = case.prompt + case.completion + 1
    with VllmServer(folder / "teacher", folder / "log", max_model_len=length) as server:
        work = Work(case, server.url, teacher, student)
        error = work.check()
        calls = {"raw": work.raw, "score": work.score, "student": work.alone, "step": work.step}
        times = timed(calls, case.repeats)
        about = work.teacher.describe()
        work.teacher.close()
    ratio = partial(_ratio, times)
    return {
        "server": {key: about[key] for key in ("kind", "version", "exact")},
        "max_abs_err_nats": error,
        "rows": [{"call": name, "p50_s": statistics.median(t)} for name, t in times.items()],
        "score_over_raw": ratio("score", "raw"),
        "step_over_sum": ratio("step", "student", "score"),
    }


def _ratio(times: dict[str, list[float]], above: str, *below: str) -> float:
    """Median over the rounds: neighbours hardly know how busy the machine was."""
    sums = [sum(parts) for parts in zip(*(times[name] for name in below), strict=True)]
    return statistics.median(a / b for a, b in zip(times[above], sums, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = CASES["tiny" if settings.tiny else "balanced"]
    document: dict[str, Any] = {"name": "bench_teacher", "case": asdict(case), "rows": []}
    if python() is None:
        reason = "no vLLM: `make test-vllm` makes its environment"
        print(f"not measured, {reason}")
        document["absent"] = reason
    else:
        with tempfile.TemporaryDirectory() as folder:
            document |= measure(case, Path(folder))
        for row in document["rows"]:
            print(f"{row['call']:<8} {row['p50_s']:8.3f} s")
        print(f"score over raw           {document['score_over_raw']:.3f}  (target 1.3)")
        print(f"step over student+score  {document['step_over_sum']:.3f}")
    print(json.dumps(document | versions()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
