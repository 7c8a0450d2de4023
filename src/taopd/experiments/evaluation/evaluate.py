"""Accuracy of a model on prompts with answers: greedy or sampled. Benchmark suites: `lm_eval`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from taopd.errors import ConfigError, DataError, require
from taopd.experiments.evaluation.accuracy import EvaluationResult, summarize
from taopd.experiments.evaluation.grading import Grader, answer_text
from taopd.models.generation import generate_ids, generation_settings, undisturbed
from taopd.models.prompts import context_length, encode_prompts
from taopd.models.stop_tokens import sampler_stop_ids


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[dict[str, Any]],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    max_new_tokens: int = 512,
    match: str = "auto",
    batch_size: int = 32,
    seed: int = 0,
    template_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Generate and grade `num_samples` completions for every row of `dataset` (columns `prompt` and
    `answer`).

    Model mode, the tokenizer's padding side and torch's random state are as before afterwards.

    Args:
        temperature: of sampling, above 0; refused when `greedy`, as are the next two. Nothing
            is taken from the checkpoint's generation config, no penalty is applied.
        top_p: sample from the most likely tokens of this mass; 1 takes all.
        top_k: sample from this many tokens; 0 takes all.
        match: "exact", "math" (math-verify), "regex:PATTERN" (all matches joined), or "auto": math
            where the answer is a number or LaTeX, or the completion has a \\boxed{...}, else exact. Of an
            answer whose last line is "#### 42" math and auto compare what stands there.
        batch_size: completions generated together.
        template_options: of the chat template (`chat_template_kwargs` of a run); a row's own win.
        progress: called with (completions done, completions in all).

    Raises:
        ConfigError: a setting outside its range.
        DataError: no rows, a row without prompt or with no or an empty answer, a prompt longer than
            the context.
    """
    grade = check_settings(
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        match=match,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    rows = list(dataset)
    if not rows:
        raise DataError("the evaluation set has no rows")
    check_rows(rows)
    prompt_ids = encode_prompts(tokenizer, rows, options=template_options)
    _check_context(prompt_ids, context_length(model), max_new_tokens)
    eos_ids = sampler_stop_ids(tokenizer, model)
    settings = generation_settings(tokenizer, eos_ids, greedy, temperature, max_new_tokens)
    settings |= {} if greedy else {"top_p": top_p, "top_k": top_k}
    work = [(problem, sample) for problem in range(len(rows)) for sample in range(num_samples)]
    transcripts = []
    with undisturbed(model, tokenizer, seed):
        config = GenerationConfig(**settings)
        for start in range(0, len(work), batch_size):
            batch = work[start : start + batch_size]
            completions = generate_ids(model, [prompt_ids[problem] for problem, _ in batch], config)
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
        | {"match": match, "seed": seed, "batch_size": batch_size, "num_samples": num_samples}
        | ({"chat_template_kwargs": dict(template_options)} if template_options else {}),
    )


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
    answer = answer_text(row["answer"])
    verdict = grade(completion, answer)
    return {
        "problem": problem,
        "sample": sample,
        "prompt": row["prompt"],
        "completion": completion,
        "answer": answer,
        "correct": verdict.correct,
        "parsed": verdict.parsed,
        "truncated": end is None,
        "num_tokens": len(kept),
    }


def check_settings(
    *,
    num_samples: int,
    temperature: float,
    top_p: float,
    top_k: int,
    greedy: bool,
    match: str,
    batch_size: int,
    max_new_tokens: int,
) -> Grader:
    """How the completions are graded; before any model is loaded.

    Raises:
        ConfigError: a setting outside its range.
    """
    require(num_samples >= 1, "num_samples", num_samples, "at least 1")
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    if not greedy and not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature={temperature}: must be above 0; for the most likely token use greedy"
        )
    if greedy and num_samples > 1:
        raise ConfigError(
            f"greedy gives the same completion {num_samples} times; drop greedy or set "
            "num_samples=1"
        )
    for name, value, plain in (
        ("temperature", temperature, (0.0, 1.0)),
        ("top_p", top_p, (1.0,)),
        ("top_k", top_k, (0, 1)),
    ):
        if greedy and value not in plain:
            raise ConfigError(
                f"{name}={value} is of sampling, and would do nothing with greedy: drop one of them"
            )
    if not 0.0 < top_p <= 1.0 or top_k < 0:
        raise ConfigError(f"top_p={top_p}, top_k={top_k}: must be in (0, 1], and 0 or more")
    return Grader(match)


def check_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Refuse problems that cannot be graded.

    Raises:
        DataError: a row without a prompt or the one answer that is right.
    """
    for index, row in enumerate(rows):
        for column in ("prompt", "answer"):
            if column in row and row[column] is None:
                raise DataError(
                    f"row {index} of the evaluation set has null as its {column}; fill it in or drop the row"
                )
            if column not in row:
                raise DataError(
                    f"row {index} of the evaluation set has no {column!r}; it has {', '.join(row)}"
                )
        # The text of a list, a time or of bytes is what no completion says: all would be wrong.
        if not isinstance(row["answer"], str | Number) or row["answer"] != row["answer"]:
            raise DataError(
                f"row {index} of the evaluation set has {row['answer']!r:.60} as its answer, which is "
                "neither text nor a number: make it the one answer that is right, or drop the row"
            )
        if not str(row["answer"]).strip():  # An empty completion would be right.
            raise DataError(
                f"row {index} of the evaluation set has an empty answer; fill it in or drop the row"
            )


def _check_context(prompt_ids: list[list[int]], context: int | None, max_new_tokens: int) -> None:
    for row, ids in enumerate(prompt_ids):
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"the prompt of row {row} has {len(ids)} tokens; with "
                f"max_new_tokens={max_new_tokens} that exceeds "
                f"the context of {context}. Lower max_new_tokens or drop the row"
            )
