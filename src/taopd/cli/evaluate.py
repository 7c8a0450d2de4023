"""`taopd evaluate`: accuracy of a model on a dataset with `prompt` and `answer`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import GRADING, Parser, positive
from taopd.cli.progress import CountedProgress
from taopd.errors import ConfigError

if TYPE_CHECKING:
    from taopd.experiments.evaluation.evaluate import EvaluationResult
    from taopd.experiments.evaluation.lm_eval import SuiteResult

_MAX_NEW_TOKENS = 512
OF_DATASET = (
    *("dataset_config", "split", "match"),
    *("num_samples", "greedy", "temperature", "top_p", "top_k"),
)
"""Flags that a suite does not read: its tasks say how they generate and grade."""
OF_SUITE = ("num_fewshot", "chat_template", "suite_path", "run_generated_code")
_WRITTEN = ("config.json", "env.json", "transcripts.jsonl", "results.json")


def run(argv: Sequence[str]) -> int:
    """Load, generate, grade, print a table, and write the folder if one is named."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.dataset is not None and options.suite is not None:
        raise ConfigError("--dataset and --suite exclude each other: drop one")
    if options.dataset is None and options.suite is None:
        raise ConfigError("name what to evaluate on: --dataset FILE or --suite lm-eval:TASK,...")
    for name in OF_DATASET if options.suite is not None else OF_SUITE:
        if getattr(options, name) != parser.get_default(name):
            this, other = ("--suite", "--dataset")[:: 1 if options.suite is not None else -1]
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {other}, and would do nothing with {this}: drop it"
            )
    if options.suite is not None:
        return _run_suite(options)

    import torch

    from taopd.experiments.evaluation.evaluate import check_settings, evaluate
    from taopd.experiments.evaluation.grading import grading_of
    from taopd.models.prompts import load_model, load_prompts, load_tokenizer
    from taopd.runs.folder import RunFolder

    if options.output is not None:
        RunFolder.check(
            options.output, overwrite=options.overwrite, reads=(options.model, options.dataset)
        )
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "num_samples",
            "temperature",
            "top_p",
            "top_k",
            "greedy",
            "batch_size",
        )
    }
    settings["match"] = options.match or grading_of(options.dataset)
    settings["max_new_tokens"] = options.max_new_tokens or _MAX_NEW_TOKENS
    check_settings(**settings)
    shown = rendered_as_in_the_run(options.model)
    rows = load_prompts(
        options.dataset, config=options.dataset_config, split=options.split, require_answer=True
    )
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    tokenizer = load_tokenizer(options.model)
    model: Any = load_model(options.model, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with CountedProgress() as advance:
        result = evaluate(
            model,
            tokenizer,
            rows,
            seed=options.seed,
            **settings,
            template_options=shown,
            progress=lambda done, total: advance("completions", done, total),
        )
    _print_table(options.model, result)
    if options.output is not None:
        head = {"model": options.model, "dataset": options.dataset}
        write_folder(options, result.transcripts, head | result.summary())
    return 0


def rendered_as_in_the_run(model: str) -> dict[str, Any]:
    """Options of the chat template of the run that a model is of; says so where there are any."""
    from taopd.runs.folder import template_options

    if shown := template_options(model):
        print(f"prompts are rendered as in the run: chat_template_kwargs {shown}", file=sys.stderr)
    return shown


def _parser() -> Parser:
    parser = Parser(
        prog="taopd evaluate",
        usage="MODEL (--dataset FILE | --suite lm-eval:TASK,...) [options]",
        description="Pass@1 and pass@k of a model on the columns prompt and answer of a dataset, with "
        "errors clustered by problem; or tasks of lm-evaluation-harness (aime24, ifeval, ...).",
        epilog="example:\n"
        "  taopd evaluate runs/x/model --dataset test.jsonl --num-samples 8 --output runs/x-eval\n"
        "  taopd evaluate runs/x/model --suite lm-eval:hendrycks_math500 --output runs/x-suite",
    )
    add = parser.flag
    add("MODEL", "folder or hub id")
    add("--dataset FILE", "file, folder or hub id")
    add("--dataset-config NAME", "of the dataset")
    add("--split NAME", "default: test, or only one")
    add("--limit N", "only the first N problems", type=positive)
    add("--match HOW", f"{GRADING} (auto; of a lab: its own)")
    add("--num-samples N", "completions a problem", default=1)
    add("--greedy", "no sampling")
    add("--temperature T", "of sampling", default=1.0)
    add("--top-p P", "nucleus sampling", default=1.0)
    add("--top-k K", "of sampling; 0: no cut", default=0)
    add("--seed N", "of sampling", default=0)
    add(
        "--max-new-tokens N",
        f"length limit of a completion (default: {_MAX_NEW_TOKENS}; of a suite: the task's own)",
        type=positive,
    )
    add("--batch-size N", "completions at a time", default=32)
    add("--output FOLDER", "results and transcripts", type=Path)
    add("--overwrite", "replace what it holds")
    add("--suite TASKS", "lm-eval:TASK,...")
    add("--num-fewshot N", "default: as the task says", type=int)
    add("--chat-template", "apply it in a suite")
    add("--suite-path FOLDER", "own task files (YAML), from a source you trust", type=Path)
    add("--run-generated-code", "allow a suite to execute what the model wrote (humaneval)")
    return parser


def _print_table(model: str, result: "EvaluationResult") -> None:
    from rich.table import Table

    from taopd.experiments.evaluation.grading import count_as_text
    from taopd.report.console import plain_console

    table = Table(title=model, show_header=False)
    for k, rate in result.pass_at_k.items():
        name = "accuracy (pass@1)" if k == 1 else f"pass@{k}"
        table.add_row(name, f"{rate:.4f} {_interval(*result.intervals[k])} (95 % interval)")
    completions = result.num_problems * result.num_samples
    table.add_row("problems x samples", f"{result.num_problems} x {result.num_samples}")
    table.add_row("truncated", f"{result.num_truncated} of {completions}")
    table.add_row("nothing to grade", f"{result.num_unparsed} of {completions}")
    if result.settings.get("match") == "auto":
        answers = {one["problem"]: one["answer"] for one in result.transcripts}
        if texts := count_as_text(answers.values()):
            table.add_row("compared as text", f"{texts} of {len(answers)} answers (--match)")
    plain_console().print(table)


def _interval(low: float, high: float) -> str:
    return f"[{low:.4f}, {high:.4f}]"


def write_folder(
    options: argparse.Namespace, transcripts: Sequence[Any], results: dict[str, Any]
) -> None:
    """Write settings, environment, transcripts and results into the folder of `--output`."""
    from taopd.report.evaluations import FROM_HERE
    from taopd.runs.folder import RunFolder, unclaimed_on_error
    from taopd.runs.jsonl import write_json, write_jsonl
    from taopd.runs.paths import expanded
    from taopd.trainer.environment import environment

    folder = RunFolder.create(options.output, overwrite=options.overwrite).path
    if (model := expanded(options.model)).exists():
        # As typed it is relative to the folder of then; the report finds the run by this one.
        results = results | {FROM_HERE: os.path.relpath(model.resolve(), folder.resolve())}
    with unclaimed_on_error(folder, _WRITTEN):
        write_json(folder / "config.json", {"command": "evaluate"} | vars(options))
        write_json(folder / "env.json", environment(seed=options.seed))
        write_jsonl(folder / "transcripts.jsonl", transcripts)
        write_json(folder / "results.json", results)
    print(f"wrote {folder / 'results.json'} and transcripts.jsonl")


def _run_suite(options: argparse.Namespace) -> int:
    """Check, run, print, and write the folder if one is named."""
    import torch

    from taopd.experiments.evaluation.lm_eval import SuiteSettings, parse_suite, run_suite
    from taopd.runs.folder import RunFolder, template_options

    tasks = parse_suite(options.suite)
    if options.chat_template and (shown := template_options(options.model)):
        print(f"the run had chat_template_kwargs {shown}, a suite has none", file=sys.stderr)
    if options.output is not None:
        RunFolder.check(
            options.output, overwrite=options.overwrite, reads=(options.model, options.suite_path)
        )
    result = run_suite(
        options.model,
        tasks,
        path=options.suite_path,
        settings=SuiteSettings(
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seed=options.seed,
            chat_template=options.chat_template,
            run_generated_code=options.run_generated_code,
        ),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    _print_suite(options.model, result)
    if options.output is not None:
        results = {
            "model": options.model,
            "suite": options.suite,
            "tasks": result.tasks,
            "num_problems": result.num_problems,
            "versions": result.versions,
            "settings": result.settings,
        }
        write_folder(options, result.samples, results)
    return 0


def _of_suite(value: float, error: float, num_problems: int) -> tuple[float, float]:
    """95 % interval of a metric: of a share by Wilson, of anything else (a loss) by its error."""
    from taopd.experiments.study.statistics import wilson

    if 0.0 <= value <= 1.0:
        return wilson(value, num_problems, error)
    return value - 1.96 * error, value + 1.96 * error


def _print_suite(model: str, result: "SuiteResult") -> None:
    from rich import box
    from rich.table import Table

    from taopd.report.console import plain_console

    table = Table(title=model, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "version", "problems", "metric", "value", "95 % interval"):
        table.add_column(name, no_wrap=name in ("task", "value"))
    for task, metrics in result.tasks.items():
        for metric, found in metrics.items():
            number, interval = result.num_problems.get(task), "-"
            if found["standard_error"] is not None and number:
                interval = _interval(*_of_suite(found["value"], found["standard_error"], number))
            table.add_row(
                task,
                str(result.versions.get(task, "-")),
                str(result.num_problems.get(task, "-")),
                metric,
                f"{found['value']:.4f}",
                interval,
            )
    plain_console().print(table)
