"""Accuracy of a model on prompts with answers: greedy or sampled.

What: `evaluate` generates completions for every problem, grades them, and returns an
`EvaluationResult`.

Why a forked random stream: evaluating inside a training run must not change what training samples
next.

Not here: benchmark suites (lm-evaluation-harness runs those).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from taopd.accuracy import EvaluationResult, summarize
from taopd.data import context_length, encode_prompts
from taopd.errors import ConfigError, DataError
from taopd.grading import Grader


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[dict[str, Any]],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    greedy: bool = False,
    max_new_tokens: int = 512,
    match: str = "auto",
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Generate and grade `num_samples` completions for every row of `dataset` (columns `prompt` and
    `answer`).

    Model mode, the tokenizer's padding side and torch's random state are as before afterwards.

    Args:
        temperature: of sampling, above 0; without effect when `greedy`. No top-k, top-p or penalty
            is applied, whatever the checkpoint's generation config says.
        match: "exact", "math" (math-verify), "regex:PATTERN" (all matches joined), or "auto": math
            where the answer is a number or LaTeX, else exact.
        batch_size: completions generated together.
        progress: called with (completions done, completions in all).

    Raises:
        ConfigError: a setting outside its range.
        DataError: no rows, a row without prompt or answer, or a prompt longer than the context.
    """
    _check_settings(
        num_samples=num_samples,
        temperature=temperature,
        greedy=greedy,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    grade = Grader(match)
    rows = list(dataset)
    _check_rows(rows)
    prompt_ids = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    _check_context(prompt_ids, context_length(model), max_new_tokens)
    eos_ids = end_of_sequence_ids(model, tokenizer)
    settings = _generation_settings(tokenizer, eos_ids, greedy, temperature, max_new_tokens)

    work = [(problem, sample) for problem in range(len(rows)) for sample in range(num_samples)]
    transcripts = []
    with _undisturbed(model, tokenizer, seed):
        config = GenerationConfig(**settings)
        for start in range(0, len(work), batch_size):
            batch = work[start : start + batch_size]
            completions = _generate(
                model, tokenizer, [prompt_ids[problem] for problem, _ in batch], config
            )
            for (problem, sample), ids in zip(batch, completions.tolist(), strict=True):
                transcripts.append(
                    _transcript(tokenizer, rows[problem], problem, sample, ids, eos_ids, grade)
                )
            if progress is not None:
                progress(len(transcripts), len(work))
    return summarize(
        transcripts,
        num_problems=len(rows),
        num_samples=num_samples,
        settings=settings
        | {"match": match, "seed": seed, "batch_size": batch_size, "num_samples": num_samples},
    )


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a completion: the tokenizer's eos and the generation config's."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.insert(0, tokenizer.eos_token_id)
    return ids


@contextmanager
def _undisturbed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[None]:
    """Evaluation mode, left padding and a random stream of our own; all as before on leaving."""
    training, side = model.training, tokenizer.padding_side
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.eval()
        tokenizer.padding_side = "left"
        try:
            yield
        finally:
            model.train(training)
            tokenizer.padding_side = side


def _generation_settings(
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
    greedy: bool,
    temperature: float,
    max_new_tokens: int,
) -> dict[str, Any]:
    # Every knob is given a neutral value: transformers fills what is None from the checkpoint's
    # generation config.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    sampling = (
        {}
        if greedy
        else {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    )
    return {
        "do_sample": not greedy,
        **sampling,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_ids or None,
        "pad_token_id": pad,
        "use_cache": True,
        "disable_compile": True,
    }


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: GenerationConfig,
) -> Tensor:
    """Completion ids [batch, new tokens], padded on the right after the end of sequence."""
    width = max(len(ids) for ids in prompts)
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output[:, width:]


def _transcript(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    problem: int,
    sample: int,
    ids: list[int],
    eos_ids: Sequence[int],
    grade: Grader,
) -> dict[str, Any]:
    end = next((position for position, token in enumerate(ids) if token in eos_ids), None)
    kept = ids[:end]
    completion = tokenizer.decode(kept, skip_special_tokens=True)
    verdict = grade(completion, str(row["answer"]))
    return {
        "problem": problem,
        "sample": sample,
        "prompt": row["prompt"],
        "completion": completion,
        "answer": str(row["answer"]),
        "correct": verdict.correct,
        "parsed": verdict.parsed,
        "truncated": end is None,
        "num_tokens": len(kept),
    }


def _check_settings(
    *, num_samples: int, temperature: float, greedy: bool, batch_size: int, max_new_tokens: int
) -> None:
    for name, value in (
        ("num_samples", num_samples),
        ("batch_size", batch_size),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if not greedy and not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature={temperature}: must be above 0; for the most likely token use greedy"
        )
    if greedy and num_samples > 1:
        raise ConfigError(
            f"greedy gives the same completion {num_samples} times; drop greedy or set "
            "num_samples=1"
        )


def _check_rows(rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise DataError("the evaluation set has no rows")
    for index, row in enumerate(rows):
        for column in ("prompt", "answer"):
            if row.get(column) is None:
                raise DataError(
                    f"row {index} of the evaluation set has no {column!r}; it has {', '.join(row)}"
                )


def _check_context(prompt_ids: list[list[int]], context: int | None, max_new_tokens: int) -> None:
    for row, ids in enumerate(prompt_ids):
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"the prompt of row {row} has {len(ids)} tokens; with "
                f"max_new_tokens={max_new_tokens} that exceeds "
                f"the context of {context}. Lower max_new_tokens or drop the row"
            )
