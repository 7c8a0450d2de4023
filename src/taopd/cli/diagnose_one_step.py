"""`taopd diagnose one-step`: one optimizer step per selector from the same batch, and its gain."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser
from taopd.cli.evaluate import rendered_as_in_the_run
from taopd.cli.progress import CountedProgress
from taopd.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

    from taopd.diagnose.bank import Rollouts


def run(argv: Sequence[str]) -> int:
    """Load, sample, step, write the folder, print the summary."""
    options = _parser().parse_args(argv)
    options.teacher = options.student if options.teacher == "self" else options.teacher

    import torch

    from taopd.diagnose.bank.manifest import (
        check_destination,
        write_manifest,
        write_parquet,
        written_whole,
    )
    from taopd.diagnose.one_step import ONE_STEP_SELECTORS, OneStepSettings, support_size
    from taopd.diagnose.one_step_table import one_step_batches, split_batches, summarize_one_step
    from taopd.models.loading import has_adapter, load_model, load_tokenizer
    from taopd.runs.schemas import ONE_STEP_FORMAT
    from taopd.teachers import load_teacher

    settings = OneStepSettings(
        selectors=tuple(options.selectors or ONE_STEP_SELECTORS),
        budget=options.budget,
        score_top_k=options.k,
        loss=options.loss,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    path = check_destination(options.output, ONE_STEP_FORMAT, overwrite=options.overwrite)
    prompts = _prompts(options)
    tokenizer = load_tokenizer(options.student)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student: Any = load_model(options.student, dtype="float32")
    if has_adapter(student):  # which takes the step
        from taopd.models.adapters import as_peft_model

        student = as_peft_model(student)
    teacher: Any
    teacher, vocab_size = load_teacher(options.teacher, student, tokenizer)
    support_size(settings, vocab_size)  # before completions are sampled
    student.to(device), teacher.to(device)
    with CountedProgress() as advance:
        rollouts = _sample(options, student, tokenizer, prompts, advance)
        rows = one_step_batches(
            student,
            teacher,
            list(split_batches(rollouts, options.completions)),
            settings,
            vocab_size=vocab_size,
            progress=lambda done, total: advance("steps", done, total),
        )
    _tell_excluded(rows, options)
    summary = summarize_one_step(rows)
    with written_whole(path, ONE_STEP_FORMAT, overwrite=options.overwrite) as folder:
        for name, table in (("steps", rows), ("summary", summary)):
            columns = {str(column): table[column].to_list() for column in table}
            write_parquet(folder / f"{name}.parquet", columns)
        content = asdict(settings) | {"batches": options.batches, "rollouts": rollouts.settings}
        write_manifest(folder, ONE_STEP_FORMAT, content)
    _print(summary, options)
    print(f"steps: {path / 'steps.parquet'}\nsummary: {path / 'summary.parquet'}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="taopd diagnose one-step",
        description="Take one optimizer step per selector, at equal budget, from the same batch of rollouts. "
        "Then measure how far both KL divergences fall on its tokens, on the other tokens, and on other "
        "prompts.",
        epilog="example:\n"
        "  taopd diagnose one-step --student S --teacher T --prompts p.parquet --output runs/one-step",
    )
    add = parser.flag
    add("--student S", "folder or hub id", required=True)
    add("--teacher T", "with the same tokenizer; self: the student", required=True)
    add("--prompts FILE", "dataset with `prompt`, perhaps `teacher_prompt`", required=True)
    add("--teacher-prompt-template TEXT", "as in `taopd train`")
    add("--split NAME", "split of the prompts", default="train")
    add("--budget B", "share of the tokens in the step", default=0.05)
    add("--selectors NAME", "default: full, random and the paper's", nargs="+")
    add("--batches N", "repetitions, for intervals", default=4)
    add("--completions N", "per batch, one per prompt; needs 2 x batches x N prompts", default=32)
    add("--max-tokens N", "tokens a completion", default=192)
    add("--learning-rate R", "of AdamW; sets the common norm of the updates", default=1e-05)
    add("--loss NAME", "loss of the step", default="reverse_kl")
    add("--k K", "support size", default=16)
    add("--temperature T", "of sampling", default=1.0)
    add("--seed N", "of sampling", default=0)
    add("--batch-size N", "completions a forward", default=8)
    add("--output FOLDER", "steps.parquet, summary.parquet, manifest", type=Path, required=True)
    add("--overwrite", "replace what it holds")
    return parser


def _tell_excluded(rows: "pd.DataFrame", options: argparse.Namespace) -> None:
    """Say how many gains are no numbers, as after a step that is too large.

    Raises:
        DataError: all of them.
    """
    excluded = int(rows["num_excluded"].sum())
    measured = int((rows["num_tokens"] + rows["num_fresh"]).sum())
    cause = f"--learning-rate {options.learning_rate:g} is too large for these models: lower it"
    if excluded == measured:
        raise DataError(f"after the step the student's divergences are NaN or infinite; {cause}")
    if excluded:
        print(
            f"taopd: {excluded:,} of {measured:,} gains are NaN or infinite and are left out of all means "
            f"(num_excluded in steps.parquet); perhaps {cause}",
            file=sys.stderr,
        )


def _prompts(options: argparse.Namespace) -> list[Any]:
    """As many different prompts as the batches need, in the order of the file."""
    from taopd.models.prompt_rows import COLUMNS
    from taopd.models.prompts import load_prompts

    for name in ("batches", "completions"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    needed = 2 * options.batches * options.completions
    rows = load_prompts(options.prompts, split=options.split)
    different = {str([row.get(name) for name in COLUMNS]): row for row in rows}
    if len(different) < needed:
        raise DataError(
            f"{options.prompts} has {len(different)} different prompts; {options.batches} batches of "
            f"{options.completions} frozen and as many fresh contexts need {needed}. Lower --batches or "
            "--completions"
        )
    return list(different.values())[:needed]


def _sample(
    options: argparse.Namespace, student: Any, tokenizer: Any, prompts: list[Any], advance: Any
) -> "Rollouts":
    from taopd.diagnose.bank import sample_rollouts
    from taopd.models.teacher_prompts import TeacherPrompts

    return sample_rollouts(
        student,
        tokenizer,
        prompts,
        num_completions=len(prompts),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        teacher_prompts=TeacherPrompts(options.teacher_prompt_template),
        template_options=rendered_as_in_the_run(options.student),
        progress=lambda done, total: advance("completions", done, total),
    )


def _print(summary: "pd.DataFrame", options: argparse.Namespace) -> None:
    """The variant that a comparison of selectors should be read from; the files hold all of them."""
    from rich.table import Table

    from taopd.report.console import plain_console

    shown = summary[(summary["optimizer"] == "adamw") & (summary["variant"] == "equal_norm")]
    table = Table(
        title=f"one AdamW step of equal norm, budget {options.budget:g}: gains in 1e-3 nats per token\n"
        f"mean [2.5, 97.5 percentile] of {options.batches} batches",
        show_lines=True,
    )
    names = {
        "gain_forward_fresh": ("forward\nfresh", 1e3),
        "gain_reverse_fresh": ("reverse\nfresh", 1e3),
        "gain_reverse_fresh_over_random": ("reverse\nover random", 1e3),
        "spearman_reverse_fresh": ("Spearman\nreverse", 1.0),
    }
    table.add_column("selector", no_wrap=True)
    for title, _ in names.values():
        table.add_column(title, justify="right")
    for selector in shown["selector"].unique():
        cells = []
        for measure, (_, unit) in names.items():
            row = shown[(shown["selector"] == selector) & (shown["measure"] == measure)]
            cells.append("-" if row.empty else _interval(row.iloc[0], unit))
        table.add_row(selector, *cells)
    plain_console().print(table)


def _interval(row: "pd.Series", unit: float) -> str:
    mean, low, high = (f"{float(row[name]) * unit:.2g}" for name in ("mean", "low", "high"))
    return f"{mean}\n[{low}, {high}]"
