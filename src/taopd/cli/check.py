"""`taopd check`: finds common faults of a distillation run before it starts.

Also run at the start of `taopd train`, where completions are cut short so that it takes seconds, passes are
silent, and a fail stops the run.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser, positive
from taopd.cli.libraries import while_loading
from taopd.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from taopd.preflight.verdict import Verdicts
    from taopd.trainer.build.from_settings import Inputs
    from taopd.trainer.settings_file import TrainSettings

_STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red"}


def run(argv: Sequence[str]) -> int:
    """Check, print a table or JSON, and return 1 if an item failed."""
    config, rest = _config_and_rest(argv)
    options, flags = _parser().parse_known_args(rest)
    if not config:
        raise ConfigError("name the config file: taopd check CONFIG")
    with while_loading():
        from taopd.cli.lab_paths import check_lab, lab_settings
        from taopd.preflight.items import Subject, verdicts
        from taopd.preflight.verdict import Verdicts
        from taopd.report.console import plain_console
        from taopd.runs.jsonl import plain
        from taopd.trainer import step_lines
        from taopd.trainer.build.from_settings import forget
        from taopd.trainer.settings_file import parse_settings

    step_lines.plain(quiet=False)
    own = _parser().flags()
    settings = parse_settings(config, flags, lab=lab_settings, check_lab=check_lab, own=own)
    folder = Path(str(settings.training.output_dir))
    existed = folder.exists()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
            found = Verdicts(verdicts(Subject(settings=settings, max_tokens=options.max_tokens)))
    finally:
        forget(folder, existed)
    if options.json:
        # As check.json holds it: JSON has no infinity.
        print(json.dumps(plain(found.as_dict()), indent=2, allow_nan=False))
    else:
        show(found, plain_console())
    return int(any(verdict.level == "fail" for verdict in found))


def _parser() -> Parser:
    parser = Parser(
        prog="taopd check",
        usage="CONFIG [--name value ...] [options]",
        description="Finds common faults of a distillation run before it starts. Nothing is trained "
        "and nothing is written. Items: tokenizers, heads, end-of-sequence and padding ids, "
        "generation configs, chat templates, thinking flags, context length, memory, dtypes. "
        "Then one micro-batch is sampled and "
        "scored: sampler against scoring pass, mass on stop ids, truncation, KL to the teacher, mass "
        "outside the student's top K, kept tokens. With teacher_url also: server, tokenizer, exact C.",
        epilog="Each item passes, warns or fails, with what to do. Exit status: 0; 1 if an item fails.\n"
        "`taopd train` runs this check too and stops at a fail; --skip-check turns it off.\n\n"
        "example:\n  taopd check recipes/tiny.yaml",
        settings=[("CONFIG", "YAML of `taopd train`; its flags are accepted here too")],
    )
    add = parser.flag
    add(
        "--max-tokens N",
        "cut the completions here (default: max_completion_length)",
        type=positive,
    )
    add("--json", "for machines")
    return parser


def _config_and_rest(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file, named by --config, first, or as a YAML file at the end; and everything else."""
    finder = Parser(prog="taopd check", description="", epilog="")
    finder.flag("--config FILE")
    options, rest = finder.parse_known_args([each for each in argv if each not in ("-h", "--help")])
    rest += [each for each in argv if each in ("-h", "--help")]
    if options.config is None and rest:
        for place in (0, -1):
            if not rest[place].startswith("-") and (
                place == 0 or rest[place].endswith((".yaml", ".yml"))
            ):
                return rest.pop(place), rest
    return options.config, rest


def show(found: "Verdicts", console: "Console") -> None:
    """The verdicts as a table, differences between texts below it in color."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "item", "measured", "what to do", show_lines=True)
    for verdict in found:
        level = Text(verdict.level, style=_STYLES[verdict.level])
        table.add_row(level, verdict.item, Text(verdict.measured), Text(verdict.advice))
    console.print(table)
    for verdict in found:
        if verdict.difference:
            text = Text(f"{verdict.item}: ")
            text.append("[-student-]", style="red").append(" ")
            text.append("{+teacher+}", style="green").append("\n")
            for owner, piece in verdict.difference:
                shown = {"student": f"[-{piece}-]", "teacher": "{+" + piece + "+}"}
                style = {"student": "red", "teacher": "green"}.get(owner, "")
                text.append(shown.get(owner, piece), style=style)
            console.print(text)
    counts = found.as_dict()["counts"]
    console.print(", ".join(f"{number} {level}" for level, number in counts.items()))


def before_training(
    settings: "TrainSettings", inputs: "Inputs", trainer: Any, *, quiet: bool
) -> dict[str, Any]:
    """The check at the start of a run: warnings and fails on stderr; returns what `--json` prints.

    Raises:
        ConfigError: an item failed.
    """
    from taopd.preflight.items import Subject, verdicts
    from taopd.preflight.verdict import Verdicts
    from taopd.trainer.run_record import QUICK_TOKENS

    subject = Subject(settings=settings, max_tokens=QUICK_TOKENS, thorough=False)
    subject.inputs, subject.trainer = inputs, trainer
    found = Verdicts(verdicts(subject))
    shown = ("fail",) if quiet else ("warn", "fail")
    for verdict in found if settings.training.process_index == 0 else ():
        if verdict.level in shown:
            print(f"check {verdict.line}", file=sys.stderr)
    found.refuse_fail("`taopd check` shows all items, --skip-check starts without the check")
    return found.as_dict()
