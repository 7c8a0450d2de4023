"""Arguments of the repository's scripts: a mistake is one line, with the argument and the help page."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn


class Arguments(argparse.ArgumentParser):
    """A parser that prints no usage on a mistake, and takes no abbreviated flag. Exit status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(prog=_program(), allow_abbrev=False, **options)

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


def _program() -> str:
    """What was typed: `python -m scripts.run_docs`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"
