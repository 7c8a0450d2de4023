"""`taopd`: the command line. One module per command; this one finds the command and turns errors
into exit codes.

Exit codes: 0 done; 1 the command found what it looks for (mismatches); 2 input, or a disk, that the caller
can mend, in one line on stderr; 130 interrupted; 143 terminated (SIGTERM). A bug keeps its traceback.

Why commands are found by hand and not by argparse's sub-parsers: `taopd --help` must not import
torch, and `taopd train` takes every field of three dataclasses as a flag, which only TRL's own
parser knows.
"""

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from taopd import __version__
from taopd.cli.given_twice import refuse_given_twice, refuse_values_twice
from taopd.cli.help_page import WIDTH, flags_of, layout, words_of
from taopd.errors import ConfigError, TaopdError, suggest
from taopd.runs.disk import disk_fault
from taopd.runs.heartbeat import Heartbeat
from taopd.runs.paths import expanded
from taopd.runs.redaction import RedactingFormatter, redact

COMMANDS = {
    "demo": "distill the bundled tiny student on this machine, in minutes",
    "train": "distill a student: any teacher, student and prompt set on disk or hub",
    "check": "find faults before a run: tokenizers, stop ids, templates, memory, drift",
    "compare": "arms x seeds from one file: which selector, at what budget, with error bars",
    "evaluate": "accuracy of a model on prompts with answers, with 95 % intervals",
    "diagnose": "which signals are learnable: freeze contexts, measure gains, report",
    "leaderboard": "every selector on every variant of the tiny lab, ranked",
    "plan": "memory, FLOPs and the ratio to full distillation, before anything runs",
    "bench": "speed and memory against TRL and full distillation",
    "report": "run folders as one HTML page, with the token inspector",
    "inspect": "a run's rollouts in the terminal, shaded by a signal",
    "conformance": "compare signals and selections with files of reference vectors",
}
INTERRUPTED, TERMINATED = 130, 143
_HELP = {"-h", "--help", "--help-all"}
GRADING = "grading: auto, exact, math or regex:PATTERN"

_USAGE = f"""usage: taopd COMMAND [options]

On-policy distillation that trains only on the tokens that a selector keeps.

commands:
{chr(10).join(f"  {name:<12} {line}" for name, line in COMMANDS.items())}

options:
  -h, --help   this page; `taopd COMMAND --help` for a command's own
  --version    print the version

example:
  taopd train --config recipes/tiny.yaml --budget 0.1
"""


class Terminated(KeyboardInterrupt):
    """A polite kill (SIGTERM), as a cluster's scheduler sends it: everything ends as after Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `ConfigError`s, without abbreviated flags.

    Its help page has a line for every flag, with the default in brackets; two short ones share a line.

    Args:
        usage: what follows the command; default: the required arguments and "[options]".
        settings: (flag, help) of flags that another parser reads; shown first.
    """

    def __init__(
        self,
        *,
        prog: str,
        description: str,
        epilog: str,
        usage: str | None = None,
        settings: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.register("type", None, _text)
        self.register("type", Path, _path)
        self._settings = settings

    def flag(self, spec: str, words: str | None = None, **options: Any) -> None:
        """Add `NAME`, `--name VALUE` or, for a switch, `--name`; a default also gives the type.

        A whole number of 0 or more, or of 1 or more, is one whatever is given in its place.
        """
        names = [part for part in spec.replace(",", "").split() if part.startswith("-")]
        value = spec.rpartition(names[-1])[2].strip() if names else spec
        default = options.get("default")
        if not value and "action" not in options:
            options["action"] = "store_true"
        elif value:
            options["metavar"] = value
            if default is not None and not isinstance(default, list | str):
                whole = positive if default else partial(positive, least=0)
                kind = Path if isinstance(default, Path) else type(default)
                options.setdefault("type", whole if kind is int else kind)
        self.add_argument(*(names or [spec.lower()]), help=words, **options)

    def format_help(self) -> str:
        """The page: usage, description, flags, examples."""
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        required = [flags_of(action) for action in actions if action.required]
        usage = self.usage or " ".join([*required, "[options]"])
        rows = [*self._settings, *((flags_of(action), words_of(action)) for action in actions)]
        description = textwrap.fill(self.description or "", WIDTH)
        head = f"usage: {self.prog} {usage}\n\n{description}"
        return f"{head}\n\n{layout(rows)}\n\n{self.epilog}\n"

    def print_help(self, file: Any = None) -> None:
        """Print the page; where nothing can be printed, argparse would say nothing of it."""
        print(self.format_help(), end="", file=file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse every argument; an unknown flag is named with the nearest known one."""
        # Before argparse, which says first that the flag is missing which is misspelt.
        for word in sys.argv[1:] if args is None else args:
            if word == "--":  # what follows are names, such as a folder that begins with a dash
                break
            if word.startswith("--"):
                self._check_flag(word)
        found, rest = self.parse_known_args(args, namespace)
        for word in rest:
            if not word.startswith("-"):
                self.error(f"unexpected argument {word!r}")
            self._check_flag(word)
        refuse_values_twice(self, found)
        return found

    def _check_flag(self, word: str) -> None:
        if (name := word.partition("=")[0]) not in self.flags():
            # A help page that is among the known ones would be no suggestion.
            known = [flag for flag in self.flags() if flag not in ("-h", "--help")]
            self.error(f"unknown flag {name!r}.{suggest(name, known)}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what is known; a flag that is given twice is refused: the last one would win silently."""
        words = list(sys.argv[1:] if args is None else args)
        refuse_given_twice(self, words)
        return super().parse_known_args(words, namespace)

    def flags(self) -> list[str]:
        """Every flag, as it is typed."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ConfigError(message)


def positive(text: str, least: int = 1) -> int:
    """A number that is at least 1: the `type` of a flag."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63, not {text}")
    return int(text)


def _text(text: str) -> str:
    """A name; one that a script left empty would be the folder that one is in, or a default."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty text")
    return text


def _path(text: str) -> Path:
    """A path; read as one, no text at all is the folder that one is in.

    A shell leaves `~` as it is in `--output=~/runs`, which would be a folder of this name.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("must be a path, not empty text")
    try:
        return expanded(text)
    except TaopdError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; `argv` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Completions hold any character, and the encoding of stdout may have few: the others as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        if sys.stdout is not None:  # which was closed before the command began
            sys.stdout.flush()
    except Exception as error:
        name = " ".join(["taopd", *arguments[:1]])
        if not isinstance(error, OSError) or sys.stdout is None or not _stdout_fails():
            if (fault := disk_fault(error)) is None:
                raise
            print(f"{name}: error: {redact(str(fault))}", file=sys.stderr)
            return 2
        # `taopd ... | head -1` has what it wanted; a run that ends so does not.
        trains = arguments[:1] == ["train"] and not _HELP.intersection(arguments)
        if not isinstance(error, BrokenPipeError) or trains:
            print(f"{name}: error: cannot print: {error.strerror or error}", file=sys.stderr)
        return 1 if isinstance(error, BrokenPipeError) else 2
    return code


def _stdout_fails() -> bool:
    """Whether stdout can take no more; it is then turned off, as Python would fail there once more."""
    try:
        print(flush=True)  # An empty line, where the fault is another one.
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run(arguments: Sequence[str]) -> int:
    """`main`, without what happens when nothing can be printed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"taopd {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        hint = suggest(command, COMMANDS)
        told = f"unknown command {command!r}.{hint} See `taopd --help`."
        print(f"taopd: error: {told}", file=sys.stderr)
        return 2
    _log_to_stderr()
    # TRL's own defaults trip transformers' deprecations; there is nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\b")
    before = _terminate_as_interrupt()
    try:
        if any(argument.startswith("lab:") or "=lab:" in argument for argument in rest):
            from taopd.cli.lab_paths import with_lab_paths

            rest = with_lab_paths(rest)
        # Under a launcher every process is a command of its own; the first one speaks.
        quiet = "--quiet" in rest or os.environ.get("RANK", "0") != "0"
        with Heartbeat(command, quiet=quiet):
            return importlib.import_module(f"taopd.cli.{command}").run(rest)
    except TaopdError as error:
        told = redact(" ".join(str(error).split()))
        page = _page(command, arguments[1:], error, told)
        print(f"taopd {command}: error: {told}{page}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"taopd {command}: interrupted", file=sys.stderr)
        return exit_code(error)
    except SystemExit as done:  # argparse, after --help
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
            return 1
        return int(done.code or 0)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of an interrupted command."""
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED


def _page(command: str, arguments: Sequence[str], error: TaopdError, told: str) -> str:
    """Where an argument is explained, for errors of settings and those that name what was typed."""
    typed = any(len(word) > 2 and word in told for word in arguments)
    if "--help" in told or not (typed or isinstance(error, ConfigError)):
        return ""
    name = command
    if command == "diagnose":
        known = importlib.import_module("taopd.cli.diagnose").COMMANDS
        name = " ".join([command, *(word for word in arguments[:1] if word in known)])
    return f"{'' if told[-1:] in ('.', '?') else '.'} See `taopd {name} --help`."


def _terminate_as_interrupt() -> Any:
    """Raise `Terminated` where SIGTERM comes, once; returns the handler that was there before."""

    def raise_once(number: int, frame: Any) -> None:
        # A scheduler repeats itself, and the first signal is still being answered.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, raise_once)


def _log_to_stderr() -> None:
    logger = logging.getLogger("taopd")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("taopd: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
