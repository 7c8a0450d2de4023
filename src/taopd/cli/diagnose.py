"""`taopd diagnose`: freeze a bank of contexts, measure gains of checkpoints, test selectors by one step."""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser, positive
from taopd.cli.evaluate import rendered_as_in_the_run
from taopd.cli.help_page import layout
from taopd.cli.progress import CountedProgress
from taopd.errors import ConfigError, DataError, require, suggest

if TYPE_CHECKING:
    from taopd.diagnose.bank import FixedContextBank, Rollouts
    from taopd.diagnose.gain import CheckpointGain

COMMANDS = {
    "freeze": "sample contexts of the student before training, and score every token",
    "gain": "what checkpoints gained on these contexts, per token, in nats and share",
    "report": "every analysis of the gains: tables, pictures, verdicts",
    "one-step": "one optimizer step per selector from one batch",
}
_EXAMPLES = {
    "freeze": "taopd diagnose freeze --student S --teacher T --prompts prompts.parquet --output runs/bank",
    "gain": "taopd diagnose gain runs/bank --after runs/x/checkpoint-50 runs/x/checkpoint-100",
    "report": "taopd diagnose report runs/bank-gain",
}


def _page() -> str:
    return (
        "usage: taopd diagnose COMMAND [options]\n\n"
        "Which signals of a teacher are learnable, and does a selector's score predict it?\n\n"
        f"{layout(list(COMMANDS.items()))}\n\n"
        "`taopd diagnose COMMAND --help` lists the options of a command.\n\n"
        f"example:\n{chr(10).join(f'  {line}' for line in _EXAMPLES.values())}"
    )


def run(argv: Sequence[str]) -> int:
    """Find the subcommand and run it."""
    from taopd.cli import diagnose_one_step, diagnose_report

    # A further subcommand is one line here and a function of its arguments.
    commands = {
        "freeze": freeze,
        "gain": gain,
        "report": diagnose_report.run,
        "one-step": diagnose_one_step.run,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_page())
        return 0
    if argv[0] not in commands:
        raise ConfigError(f"unknown subcommand {argv[0]!r}.{suggest(argv[0], commands)}")
    return commands[argv[0]](argv[1:])


def freeze(argv: Sequence[str]) -> int:
    """Load, sample or read, score, write the bank; print what it holds."""
    parser = _freeze_parser()
    options = parser.parse_args(argv)
    options.teacher = options.student if options.teacher == "self" else options.teacher
    if (options.prompts is None) == (options.completions is None):
        raise ConfigError("give the contexts: either --prompts FILE or --completions FILE")
    for name in ("teacher_prompt_template", "split", "seed"):
        if options.completions is not None and getattr(options, name) != parser.get_default(name):
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with --prompts, and would do nothing with --completions: "
                "drop it (lines of --completions may have a teacher_prompt)"
            )

    # Before the models are loaded and completions sampled.
    above = 0 < options.temperature < math.inf
    require(above, "--temperature", options.temperature, "a finite number above 0")

    import torch

    from taopd.diagnose.bank import BANK_FORMAT, FixedContextBank
    from taopd.diagnose.bank.bank import vocabulary_and_sizes
    from taopd.diagnose.bank.manifest import SOURCES, check_destination
    from taopd.models.loading import load_model, load_tokenizer
    from taopd.runs.jsonl import write_json

    check_destination(options.output, BANK_FORMAT, overwrite=options.overwrite)
    tokenizer, teacher_tokenizer = (load_tokenizer(m) for m in (options.student, options.teacher))
    given = _contexts(options, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student: Any = load_model(options.student, dtype=options.dtype)
    teacher: Any = load_model(options.teacher, dtype=options.dtype)
    vocabulary_and_sizes(student, teacher, tokenizer, teacher_tokenizer, options.k)
    student.to(device), teacher.to(device)
    with CountedProgress() as advance:
        rollouts = given(student, lambda done, total: advance("completions", done, total))
        own = rollouts.teacher_prompt_ids
        if options.teacher == options.student and own in (None, rollouts.prompt_ids):
            raise ConfigError(
                "the teacher is the student and reads the same prompts, so that both agree at every token: "
                "name another --teacher, or give it prompts of its own (a column teacher_prompt, or "
                "--teacher-prompt-template)"
            )
        bank = FixedContextBank.freeze(
            student,
            teacher,
            tokenizer,
            rollouts,
            options.output,
            teacher_tokenizer=teacher_tokenizer,
            k=options.k,
            temperature=options.temperature,
            batch_size=options.batch_size,
            overwrite=options.overwrite,
            progress=lambda done, total: advance("tokens scored", done, total),
        )
    sources = {
        role: _relative(getattr(options, role), bank.folder) for role in ("student", "teacher")
    }
    write_json(bank.folder / SOURCES, sources)
    _print_bank(bank)
    return 0


def gain(argv: Sequence[str]) -> int:
    """Open the bank, measure every checkpoint, write the folder, print the curve."""
    parser = Parser(
        prog="taopd diagnose gain",
        description="Measure how much closer to the teacher trained students are than the bank's student, at "
        "every token of the bank: the decrease of both KL divergences over the full vocabulary, in nats "
        "and as a share of the initial KL. Several checkpoints make a curve.",
        epilog=f"example:\n  {_EXAMPLES['gain']}",
    )
    add = parser.flag
    add("BANK", "folder that `taopd diagnose freeze` wrote", type=Path)
    add(
        "--after CHECKPOINT",
        "folders or hub ids, LoRA adapters too, in the order of the curve",
        nargs="+",
        required=True,
    )
    add("--teacher T", "the bank's teacher, where it was moved")
    add("--output FOLDER", "gains in Parquet and a manifest (default: BANK-gain)", type=Path)
    add("--overwrite", "replace the gains in that folder")
    options = parser.parse_args(argv)

    import torch

    from taopd.diagnose.bank import FixedContextBank
    from taopd.diagnose.bank.manifest import check_destination
    from taopd.diagnose.gain import measure_gains
    from taopd.diagnose.gain_files import write_gains
    from taopd.models.loading import load_model
    from taopd.runs.schemas import GAIN_FORMAT

    bank = FixedContextBank.open(options.bank)
    output = options.output or bank.folder.with_name(f"{bank.folder.name}-gain")
    check_destination(output, GAIN_FORMAT, overwrite=options.overwrite)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = bank.fingerprints["teacher"]["dtype"]
    teacher: Any = load_model(options.teacher or _source(bank, "teacher"), dtype=dtype)
    with CountedProgress() as advance:
        gains = measure_gains(
            bank, options.after, teacher.to(device), device=device, progress=advance
        )
    folder = write_gains(gains, bank, output, overwrite=options.overwrite)
    _print_gains(gains)
    print(f"gains: {folder}")
    return 0


def _freeze_parser() -> Parser:
    parser = Parser(
        prog="taopd diagnose freeze",
        description="Sample completions of the student, score every token with both models, and write both "
        "to a folder, the bank.",
        epilog=f"example:\n  {_EXAMPLES['freeze']}",
    )
    add = parser.flag
    add("--student S", "before training; folder or hub id", required=True)
    add("--teacher T", "folder or hub id; self: the student", required=True)
    add("--prompts FILE", "dataset with `prompt`, perhaps `teacher_prompt`: file, folder or hub id")
    add("--teacher-prompt-template TEXT", "as in `taopd train`; with --prompts")
    add("--split NAME", "split of the prompts", default="train")
    add(
        "--completions FILE",
        "instead of --prompts: JSON lines with prompt and completion",
        type=Path,
    )
    add(
        "--num-completions N",
        "completions, over the prompts in turn (default: 300; of a file: all)",
        type=positive,
    )
    add("--max-tokens N", "tokens a completion", default=192)
    add("--k K", "support sizes", type=positive, nargs="+", default=[8, 16, 32])
    add("--temperature T", "of sampling and of both distributions", default=1.0)
    add("--seed N", "of sampling", default=0)
    add("--batch-size N", "completions a forward", default=8)
    add(
        "--dtype NAME",
        "of both models, also later",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
    )
    add("--output BANK", "folder to write", type=Path, required=True)
    add("--overwrite", "replace the bank in it")
    return parser


def _contexts(
    options: argparse.Namespace, tokenizer: Any
) -> Callable[[Any, Callable[[int, int], None]], "Rollouts"]:
    """Reads the file of contexts; what it returns samples of a student, if the file holds prompts alone."""
    from taopd.diagnose.bank import NUM_COMPLETIONS, read_completions, sample_rollouts
    from taopd.models.prompts import load_prompts
    from taopd.models.teacher_prompts import TeacherPrompts

    shown = rendered_as_in_the_run(options.student)
    if options.completions is not None:
        rollouts = read_completions(
            options.completions,
            tokenizer,
            num_completions=options.num_completions,
            max_tokens=options.max_tokens,
            template_options=shown,
        )
        return lambda student, progress: rollouts
    rows = load_prompts(options.prompts, split=options.split)
    number = NUM_COMPLETIONS if options.num_completions is None else options.num_completions
    return lambda student, progress: sample_rollouts(
        student,
        tokenizer,
        list(rows.select(range(min(max(number, 0), len(rows))))),
        num_completions=number,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        teacher_prompts=TeacherPrompts(options.teacher_prompt_template),
        template_options=shown,
        progress=progress,
    )


def _relative(name: str, folder: Path) -> str:
    """A model's folder as seen from the bank, past symbolic links; a hub id as it is."""
    if not Path(name).exists():
        return name
    # Beyond a link ".." is the folder above the one that it leads to.
    return os.path.relpath(os.path.realpath(name), os.path.realpath(folder))


def _source(bank: "FixedContextBank", role: str) -> str:
    """Where a model of the bank is, if it still is there; the bank's fingerprint is checked later."""
    from taopd.diagnose.bank.manifest import SOURCES

    try:
        name = json.loads((bank.folder / SOURCES).read_text(encoding="utf-8"))[role]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the bank does not say where its {role} is; name it with --{role}"
        ) from error
    if not str(name).startswith("."):
        return str(name)
    path = (bank.folder / name).resolve()
    if not path.exists():
        raise DataError(f"the bank's {role} is no longer at {path}; name it with --{role}")
    return str(path)


def _print_bank(bank: "FixedContextBank") -> None:
    from rich.table import Table

    from taopd.report.console import plain_console

    manifest, tokens = bank.manifest, bank.tokens
    table = Table(title=str(bank.folder), show_header=False)
    table.add_row("tokens", f"{manifest['num_tokens']:,}")
    table.add_row("completions", f"{manifest['num_completions']:,}")
    table.add_row("prompts", f"{manifest['num_prompts']:,}")
    table.add_row("shared vocabulary", f"{bank.vocab_size:,} ids")
    table.add_row("tokens outside it", f"{manifest['num_outside_vocabulary']:,}")
    for name in ("forward_kl", "reverse_kl", "entropy", "teacher_entropy"):
        table.add_row(f"mean {name.replace('_', ' ')}", f"{tokens[name].mean():.4f} nats")
    for k in bank.k:
        mean = tokens[f"compatibility_k{k}"].mean()
        table.add_row(f"mean compatibility, K = {k}", f"{mean:.4f}")
    plain_console().print(table)


def _print_gains(gains: "Sequence[CheckpointGain]") -> None:
    from rich.table import Table

    from taopd.report.console import plain_console

    table = Table(title="gain in nats per token (share of the initial KL); > 0 is nearer")
    table.add_column("checkpoint", overflow="fold")
    table.add_column("KL")
    for name in ("all tokens", "learnable", "incompatible", "excluded"):
        table.add_column(name, justify="right")
    for measured in gains:
        summary = measured.summary()
        for direction in ("forward", "reverse"):
            cells = [
                _gain_cell(summary, direction, group)
                for group in ("mean", "learnable", "incompatible")
            ]
            excluded = f"{summary['num_excluded']} of {summary['num_tokens']}"
            table.add_row(measured.label, direction, *cells, excluded)
    plain_console().print(table)


def _gain_cell(summary: dict[str, Any], direction: str, group: str) -> str:
    nats = summary[f"gain_{direction}_nats/{group}"]
    if nats != nats:  # no token in the group
        return "-"
    return f"{nats:+.4f} ({summary[f'gain_{direction}_share/{group}']:+.1%})"
