"""`taopd evaluate --suite`: tasks of lm-evaluation-harness on a checkpoint, as a table and a run folder."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taopd.experiments.evaluation.lm_eval import SuiteResult


def run(options: argparse.Namespace) -> int:
    """Check, run, print, and write the folder if one is named."""
    import torch

    from taopd.cli.evaluate import write_folder
    from taopd.experiments.evaluation.lm_eval import SuiteSettings, parse_suite, run_suite
    from taopd.runs.folder import RunFolder

    tasks = parse_suite(options.suite)
    if options.output is not None:
        RunFolder.check(options.output, overwrite=options.overwrite)
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
    _print_table(options.model, result)
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


def _print_table(model: str, result: "SuiteResult") -> None:
    from rich import box
    from rich.table import Table

    from taopd.report.console import plain_console

    table = Table(title=model, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "version", "problems", "metric", "value", "standard error"):
        table.add_column(name, no_wrap=name in ("task", "value"))
    for task, metrics in result.tasks.items():
        for metric, found in metrics.items():
            error = found["standard_error"]
            table.add_row(
                task,
                str(result.versions.get(task, "-")),
                str(result.num_problems.get(task, "-")),
                metric,
                f"{found['value']:.4f}",
                "-" if error is None else f"{error:.4f}",
            )
    plain_console().print(table)
