"""`taopd check`: what usually ruins a distillation run, looked for before it starts.

Also run at the start of `taopd train`, where completions are cut short so that it takes seconds, passes are
silent, and a fail stops the run.
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from taopd.preflight.verdict import Verdict
    from taopd.trainer.from_settings import Inputs
    from taopd.trainer.settings_file import TrainSettings

_HELP = """usage: taopd check CONFIG [--name value ...] [--max-tokens N] [--json]

Looks for what usually ruins a distillation run, before it starts; CONFIG is the YAML of `taopd
train`, and its flags are accepted here too. Nothing is trained and nothing is written.

Tokenizers and heads, end-of-sequence and padding ids, generation configs, the chat template of both
models, thinking flags, context, memory (`taopd plan`), number formats; then one micro-batch is
sampled and scored: sampling log-probs against recomputed ones, both models' mass on every stop id
where completions end, truncation, KL to the teacher, mass off the student's top K, kept tokens.
With teacher_url: who answers, whether C is exact, its tokenizer; what no server sends is named.

  --max-tokens N     cut the completions here (default: max_completion_length)
  --json             for machines

Each item passes, warns or fails, with what to do. Exit status: 0; 1 if an item fails. `taopd train`
looks too and stops at a fail; --skip-check goes on.

example:
  taopd check recipes/tiny.yaml
"""
QUICK_TOKENS = 256
"""Tokens of a completion in the look that `taopd train` takes."""
_STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red"}


def run(argv: Sequence[str]) -> int:
    """Check, print a table or JSON, and return 1 if an item failed."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("-h", "--help", action="store_true")
    own.add_argument("config", nargs="?")
    own.add_argument("--json", action="store_true")
    own.add_argument("--max-tokens", type=_positive)
    config, rest = _config_and_rest(argv)
    try:
        options, flags = own.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if options.help:
        print(_HELP, end="")
        return 0
    if config is None:
        raise ConfigError("name the config file: taopd check CONFIG")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\b")
    from taopd.cli import step_lines
    from taopd.preflight.items import Subject, verdicts
    from taopd.report.console import plain_console
    from taopd.trainer.from_settings import forget
    from taopd.trainer.settings_file import parse_settings

    step_lines.plain(quiet=True)
    settings = parse_settings(config, flags)
    folder = Path(str(settings.training.output_dir))
    existed = folder.exists()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
            found = list(verdicts(Subject(settings=settings, max_tokens=options.max_tokens)))
    finally:
        forget(folder, existed)
    if options.json:
        print(json.dumps(as_dict(found), indent=2, allow_nan=True))
    else:
        show(found, plain_console())
    return int(any(verdict.level == "fail" for verdict in found))


def _config_and_rest(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file, named first or by --config, and everything else."""
    rest = list(argv)
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    if "--config" in rest[:-1]:
        place = rest.index("--config")
        return rest[place + 1], rest[:place] + rest[place + 2 :]
    return None, rest


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def as_dict(found: Sequence["Verdict"]) -> dict[str, Any]:
    """What `--json` prints."""
    counts = {level: sum(v.level == level for v in found) for level in _STYLES}
    return {"counts": counts, "items": [verdict.as_dict() for verdict in found]}


def show(found: Sequence["Verdict"], console: "Console") -> None:
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
    counts = as_dict(found)["counts"]
    console.print(", ".join(f"{number} {level}" for level, number in counts.items()))


def before_training(
    settings: "TrainSettings", inputs: "Inputs", trainer: Any, *, quiet: bool
) -> dict[str, Any]:
    """The look at the start of a run: warnings and fails on stderr; returns what `--json` prints.

    Raises:
        ConfigError: an item failed.
    """
    from taopd.preflight.items import Subject, verdicts

    subject = Subject(settings=settings, max_tokens=QUICK_TOKENS)
    subject.inputs, subject.trainer = inputs, trainer
    found = list(verdicts(subject))
    failed = [verdict for verdict in found if verdict.level == "fail"]
    if settings.training.process_index == 0:
        for verdict in failed if quiet else [v for v in found if v.level != "pass"]:
            line = f"check {verdict.level}: {verdict.item}: {verdict.measured}. {verdict.advice}"
            print(line, file=sys.stderr)
    if failed:
        names = ", ".join(verdict.item for verdict in failed)
        raise ConfigError(
            f"the check before training failed ({names}): {failed[0].advice} `taopd check` shows all of it, "
            "--skip-check trains all the same"
        )
    return as_dict(found)
