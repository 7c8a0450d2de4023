"""Pretrain one model of a lab from scratch: `python -m taopd.experiments.lab.pretrain JOB.json`.

What: fixed-length batches (8 prompt + 9 completion tokens, hence no padding) drawn from the task, a
cross-entropy over the completion alone, AdamW under one warm-up-and-cosine cycle, fp32, no dropout.
The model is an ordinary Qwen3 (`tie_word_embeddings=False`: a word that is never written then has
its own output row), saved as any Hugging Face checkpoint.
Why a command and not a function of `build` alone: teacher and student then train side by side, each
in a process of its own with one thread, whatever threads the caller uses. The same numbers come out
either way, bit for bit, since both run on one thread with generators of their own.
Not here: the folder's life (see `build`). Progress leaves as one JSON object a line on stdout.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from taopd.experiments.lab import task
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.lab.tokenizer import build_tokenizer
from taopd.experiments.lab.variants import COMPLETION_LENGTH, NUM_NUMBERS, Role

WARMUP_SHARE = 0.1
"""Share of the steps in which the learning rate rises."""
INITIALIZER_RANGE = 0.05
"""Standard deviation of the first weights. Qwen3's 0.02 suits wide models: at width 48 the digits
were then not learned after 2,500 steps, with 0.05 they were."""
MLP_RATIO = 2
REPORTS = 50
"""Progress reports over a run."""


def split_pairs(spec: LabSpec) -> tuple[Tensor, Tensor]:
    """Return (pairs that may be trained on, pairs held out for the test), each [N, 2].

    The first `num_train_prompts` of the former are the lab's training prompts.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    codes = torch.randperm(NUM_NUMBERS**2, generator=generator)
    pairs = torch.stack([codes // NUM_NUMBERS, codes % NUM_NUMBERS], dim=1)
    return pairs[spec.num_test_prompts :], pairs[: spec.num_test_prompts]


def pretrain(
    spec: LabSpec,
    role: Role,
    folder: Path,
    progress: Callable[[int, int], object] = lambda step, total: None,
) -> dict[str, float]:
    """Train one model, save it with its tokenizer in `folder`, and return its measurements.

    Returns greedy `accuracy` on the held-out prompts and the `seconds` it all took. Leaves the
    caller's random state and number of threads as they were.
    """
    started = time.perf_counter()
    train_pairs, test_pairs = split_pairs(spec)
    with _one_thread(), torch.random.fork_rng(devices=[]), _no_transformers_bars():
        torch.manual_seed(_stream(spec, role, "weights"))
        model = Qwen3ForCausalLM(_model_config(spec, role))
        _train(model, spec, role, train_pairs, progress)
        model.eval()
        tokenizer = build_tokenizer()
        accuracy = _greedy_accuracy(model, tokenizer, spec, test_pairs)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"accuracy": accuracy, "seconds": time.perf_counter() - started}


def _model_config(spec: LabSpec, role: Role) -> Qwen3Config:
    width = spec.width(role)
    num_heads = width // spec.head_dim
    return Qwen3Config(
        vocab_size=len(task.WORDS),
        hidden_size=width,
        intermediate_size=MLP_RATIO * width,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=spec.head_dim,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=task.MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=task.BOS_ID,
        eos_token_id=task.WORDS.index(spec.rules.teacher_end) if role == "teacher" else task.EOS_ID,
        pad_token_id=task.PAD_ID,
    )


def _train(
    model: Qwen3ForCausalLM,
    spec: LabSpec,
    role: Role,
    pairs: Tensor,
    progress: Callable[[int, int], object],
) -> None:
    total = spec.steps(role)
    generator = torch.Generator().manual_seed(_stream(spec, role, "data"))
    # torch's default moments: a second moment of 0.95 drives words that are never written to
    # exp(-20), 0.999 leaves them near exp(-12).
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.train()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * _one_cycle(step, total)
        inputs, labels = _batch(spec, role, pairs, generator)
        logits = model(inputs, logits_to_keep=COMPLETION_LENGTH, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, total // REPORTS) == 0 or step + 1 == total:
            progress(step + 1, total)


def _batch(
    spec: LabSpec, role: Role, pairs: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (token ids [B, 16], next completion tokens [B, 9])."""
    rows = torch.randint(len(pairs), (spec.batch_size,), generator=generator)
    left, right = pairs[rows].unbind(1)
    if role == "teacher":
        read, labels = task.teacher_completions(
            spec.rules, left, right, generator, rewrite_share=spec.rewrite_share
        )
    else:
        read = labels = task.student_completions(
            spec.rules, left, right, generator, carryless_share=spec.carryless_share
        )
    return torch.cat([task.prompt_ids(left, right), read[:, :-1]], dim=1), labels


def _one_cycle(step: int, total: int) -> float:
    """Return the factor of the peak learning rate: a linear rise, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _greedy_accuracy(model: Any, tokenizer: Any, spec: LabSpec, pairs: Tensor) -> float:
    left, right = pairs.unbind(1)
    prompts = task.prompt_ids(left, right)
    outputs = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=COMPLETION_LENGTH,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(outputs[:, prompts.shape[1] :], skip_special_tokens=True)
    answers = [task.answer_text(spec.rules, a, b) for a, b in pairs.tolist()]
    right_ones = sum(
        task.is_correct(text, answer, spec.rules.answer_pattern)
        for text, answer in zip(texts, answers, strict=True)
    )
    return right_ones / len(answers)


def _stream(spec: LabSpec, role: Role, purpose: str) -> int:
    """Return a seed of its own for each use of randomness."""
    streams = ("teacher weights", "teacher data", "student weights", "student data")
    return spec.seed * len(streams) + streams.index(f"{role} {purpose}") + 1


@contextmanager
def _one_thread():
    """Run on one thread: two would change the order of sums, hence the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_transformers_bars():
    """Keep transformers' own progress bars (one for a save of 0.4 MiB) off the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def main(job_file: str) -> None:
    """Run the job that `build` wrote: `{"sizes": {...}, "role": ..., "folder": ...}`."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))

    def say(**message: object) -> None:
        print(json.dumps(message), flush=True)

    spec = LabSpec(**job["sizes"])
    result = pretrain(
        spec, job["role"], Path(job["folder"]), lambda step, total: say(step=step, total=total)
    )
    say(result=result)


if __name__ == "__main__":
    main(sys.argv[1])
