"""Arguments of the repository's scripts: a mistake is one line, with the argument and the help page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class Arguments(argparse.ArgumentParser):
    """A parser that prints no usage on a mistake, and takes no abbreviated flag. Exit status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(prog=_program(), allow_abbrev=False, **options)
        self._runs: tuple[Path, Sequence[str], bool] | None = None

    def add_runs(
        self, default: str, *, finished: Sequence[str] = ("*__*.json",), from_saved: bool = False
    ) -> None:
        """Add `--runs FOLDER` and `--gather`, which runs nothing and needs finished runs in the folder.

        Args:
            finished: patterns of their files; a file of each must be there.
            from_saved: the page can be made of the saved file too: without `--runs`, where the default
                folder lacks a file, `runs` is None.
        """
        self._runs = Path(default), finished, from_saved
        self.add_argument("--runs", type=Path, default=self._runs[0])
        saved = "; without --runs and its default folder of the saved file" if from_saved else ""
        words = f"run nothing: the results of the runs that have finished{saved}"
        self.add_argument("--gather", action="store_true", help=words)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; nothing to gather is a mistake in `--runs`."""
        found = super().parse_args(args, namespace)
        if self._runs is None or not found.gather:
            return found
        default, finished, from_saved = self._runs
        missing = what_is_missing(found.runs, *finished)
        # The default itself: the same words as an argument are a folder that was asked for.
        if missing and from_saved and found.runs is default:
            found.runs = None
        elif missing:
            self.error(f"argument --runs: {missing}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print one line and leave."""
        self.exit(
            2, f"{self.prog}: error: {' '.join(message.split())}. See `{self.prog} --help`.\n"
        )


def existing_file(text: str) -> Path:
    """A path to a file that is there: the `type` of an argument."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def existing_folder(text: str) -> Path:
    """Likewise to a folder."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def what_is_missing(folder: Path, *patterns: str) -> str:
    """In words, the folder or a file of one of these patterns in it; nothing where all are there."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    lacking = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    return f"there is no file {lacking[0]} in {folder}" if lacking else ""


def _program() -> str:
    """What was typed: `python -m scripts.run_docs`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"
