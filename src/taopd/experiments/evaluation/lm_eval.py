"""Benchmark suites through lm-evaluation-harness, an optional extra: `pip install 'taopd[eval]'`.

Why not our own AIME or IFEval: scores are only comparable when prompt, extraction and grading are the ones
that others use. The harness's name of a task and its version go into the results with every setting.

Harness names of the published benchmarks: aime24, aime25, gpqa_diamond_cot_zeroshot, humaneval (base
models) or humaneval_instruct, ifeval, hendrycks_math500 (answer in a box) or minerva_math500 (four examples).
HumanEval runs the code that the model wrote, which must be allowed explicitly. Task files of a folder of
your own may name Python functions: load folders that you trust, and no others.

Source: https://github.com/EleutherAI/lm-evaluation-harness.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taopd.errors import ConfigError, DataError, nearest
from taopd.models.prompts import load_tokenizer

PREFIX = "lm-eval:"
PUBLISHED = {
    "AIME24": "aime24",
    "AIME25": "aime25",
    "GPQA-Diamond": "gpqa_diamond_cot_zeroshot",
    "HumanEval": "humaneval",
    "IFEval": "ifeval",
    "MATH-500": "hendrycks_math500",
}
"""Benchmarks of arXiv 2605.26844 by their names in the harness (0.4.13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSettings:
    """Settings of a suite; None takes the task's default."""

    limit: int | None = None
    """Only the first N problems of every task."""
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    seed: int = 0
    chat_template: bool = False
    run_generated_code: bool = False
    """Allow tasks that execute what the model wrote (HumanEval)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """Scores and transcripts of a suite."""

    tasks: dict[str, dict[str, Any]]
    """Task to metric to {"value", "standard_error"}; metrics are named metric,filter."""
    num_problems: dict[str, int]
    versions: dict[str, Any]
    """Version of every task, and of the harness."""
    settings: dict[str, Any]
    samples: list[dict[str, Any]] = field(repr=False)
    """Transcripts: task, problem, prompt, completions, and the task's own verdicts."""


def parse_suite(suite: str) -> list[str]:
    """The tasks of `lm-eval:TASK,...`; a benchmark's published name stands for its harness name.

    Raises:
        ConfigError: another prefix, or no task.

    Example:
        >>> parse_suite("lm-eval:MATH-500,ifeval")
        ['hendrycks_math500', 'ifeval']
    """
    names = [name.strip() for name in suite.removeprefix(PREFIX).split(",") if name.strip()]
    if not suite.startswith(PREFIX) or not names:
        raise ConfigError(f"suite {suite!r}: expected lm-eval:TASK,..., like lm-eval:aime24,ifeval")
    return list(dict.fromkeys(PUBLISHED.get(name, name) for name in names))


def run_suite(
    model: str,
    tasks: Sequence[str],
    *,
    path: Path | None = None,
    settings: SuiteSettings | None = None,
    device: str = "cpu",
) -> SuiteResult:
    """Run harness tasks on a checkpoint: a Hugging Face folder or a hub id.

    Args:
        path: folder of task files of your own, beside the harness's.

    Raises:
        ConfigError: the harness is not installed, or has no such task. DataError: the model or a task's
            dataset cannot be loaded.
    """
    settings = settings or SuiteSettings()
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--suite needs lm-evaluation-harness: pip install 'taopd[eval]'")
    if path is not None and not path.is_dir():
        raise DataError(f"--suite-path: no such folder: {path}")
    load_tokenizer(model)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if path is None else str(path))
    check_tasks(tasks, manager.all_tasks, path)
    if settings.run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    output = _evaluate(model, tasks, manager, settings, device)
    return SuiteResult(
        tasks={task: _metrics(metrics) for task, metrics in sorted(output["results"].items())},
        num_problems={task: n["effective"] for task, n in sorted(output["n-samples"].items())},
        versions=dict(sorted(output["versions"].items())) | {"lm_eval": output["lm_eval_version"]},
        settings={
            "limit": settings.limit,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "chat_template": settings.chat_template,
            "num_fewshot": dict(output["n-shot"]),
            "generation": {
                task: config.get("generation_kwargs") for task, config in output["configs"].items()
            },
        },
        samples=[
            _sample(task, sample)
            for task, samples in sorted(output["samples"].items())
            for sample in samples
        ],
    )


def check_tasks(tasks: Sequence[str], known: Sequence[str], path: Path | None) -> None:
    """Refuse tasks that do not exist.

    Raises:
        ConfigError: with the nearest known task.
    """
    for task in tasks:
        if task not in known:
            where = "" if path is None else f" nor in {path}"
            listed = " `lm-eval ls tasks` lists them; --suite-path FOLDER adds your own."
            hint = nearest(task, known) or listed
            raise ConfigError(f"lm-evaluation-harness has no task {task!r}{where}.{hint}")


def _evaluate(
    model: str, tasks: Sequence[str], manager: Any, settings: SuiteSettings, device: str
) -> dict[str, Any]:
    import lm_eval

    tokens = settings.max_new_tokens
    try:
        output = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "auto", "trust_remote_code": False},
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            device=device,
            limit=settings.limit,
            gen_kwargs=None if tokens is None else {"max_gen_toks": tokens},
            apply_chat_template=settings.chat_template,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            confirm_run_unsafe_code=settings.run_generated_code,
            log_samples=True,
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(f"lm-evaluation-harness stopped: {error}") from error
    return dict(output) | {"lm_eval_version": lm_eval.__version__}


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """{"exact_match,none": .5, "exact_match_stderr,none": .1} to value and standard error."""
    out = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        known = float(error) if isinstance(error, int | float) else math.nan
        out[name] = {
            "value": float(value),
            "standard_error": known if math.isfinite(known) else None,
        }
    return out


def _sample(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    raw = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
    hidden = {"doc_hash", "prompt_hash", "target_hash"}
    return {
        "task": task,
        "problem": sample["doc_id"],
        "filter": sample.get("filter"),
        "prompt": _first(sample["arguments"]),
        "answer": str(sample["target"]),
        "completions": [str(r) for group in sample["resps"] for r in _listed(group)],
        "graded": [str(response) for response in _listed(sample["filtered_resps"])],
        "verdict": {k: v for k, v in sample.items() if k not in raw | hidden},
    }


def _first(arguments: Any) -> str:
    while isinstance(arguments, dict | list | tuple) and arguments:
        arguments = next(iter(arguments.values() if isinstance(arguments, dict) else arguments))
    return str(arguments)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
