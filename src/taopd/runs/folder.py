"""The run folder: one folder per run, and the only interface between a run and whoever reads it.

What: `RunFolder.create` claims a folder for one run and refuses one that holds another;
`taopd.runs.jsonl` writes its files.

Why a marker file: a folder is only ever emptied (`overwrite=True`) when taopd made it. A
`config.json` alone proves nothing, every Hugging Face model folder has one. Even then only files
that a run writes are removed.

Not here: checkpoints (transformers writes them) and reading (`report`).
"""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from taopd.errors import ConfigError, DataError, TaopdError
from taopd.runs.checkpoints import PARTIAL, newest_complete
from taopd.runs.jsonl import write_json
from taopd.runs.lock import HOLDER, LOCK, refuse_if_held
from taopd.runs.paths import expanded
from taopd.runs.validation import read_document, shown
from taopd.runs.versions import installed_version

logger = logging.getLogger(__name__)

MARKER = ".taopd-run"
MODEL_FOLDER, MODEL_PARTIAL = "model", ".model-partial"
CONFIG_BESIDE_MODEL = "run_config.json"
"""Settings of a run in whose own folder a model was saved: `config.json` is the model's then."""
# What makes a folder of ours hold a run.
_EVIDENCE = ("config.json", "metrics.jsonl", "results.json", "checkpoint-*")
# What makes a folder one of `taopd diagnose`: a bank or its gains, a one-step table, a report.
_OF_DIAGNOSE = ("tokens.parquet", "steps.parquet", "verdicts.json")
# What a run writes, and so what `overwrite` may remove: the run's own files, then Hugging Face's
# model files.
_OWNED = (
    MARKER,
    "config.json",
    CONFIG_BESIDE_MODEL,
    "env.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "warnings.jsonl",
    "teacher.json",
    "check.json",
    "results.json",
    "transcripts.jsonl",
    "bad_numbers",
    "selection.parquet",
    "selection",
    "checkpoint-*",
    MODEL_FOLDER,
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "training_args.bin",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A folder that belongs to one run.

    Example:
        >>> folder = RunFolder.create("runs/x", overwrite=True)  # doctest: +SKIP
        >>> write_json(folder.path / "results.json", {"accuracy": 0.5})  # doctest: +SKIP
    """

    path: Path
    """Absolute path of the folder."""

    @staticmethod
    def check(
        path: str | Path,
        *,
        command: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        also_owns: Sequence[str] = (),
        reads: Iterable[object] = (),
    ) -> Path:
        """Return the absolute path if `create` would accept it; leave nothing behind.

        Args:
            command: the one that goes on with runs of its own; None: it goes on with none.
            reads: models and data of the run; hub ids, objects and None may stand among the paths.

        Raises:
            ConfigError: `resume` and `overwrite` together.
            DataError: the folder holds another run, another process writes into it, `path` is a file,
                nothing can be written there, or `overwrite` would remove what is read.
        """
        if resume and overwrite:
            raise ConfigError(
                "resume and overwrite exclude each other: go on with the run, or start it anew"
            )
        folder = expanded(path).absolute()
        # How Python reads bytes of a command line that are no text.
        if any("\udc80" <= letter <= "\udcff" for letter in str(folder)):
            raise DataError(
                f"cannot use {shown(str(path))}: its name is no text in this locale, and libraries write it "
                "into files: set LC_ALL=C.UTF-8 (PYTHONUTF8=1), or take another name"
            )
        try:
            ours = (folder / MARKER).exists()
            # A run replaces all that it writes: what is there already must be its own.
            patterns = _EVIDENCE if ours else (*_OWNED, *also_owns, *_OF_DIAGNOSE)
            evidence = sorted(found.name for pattern in patterns for found in folder.glob(pattern))
        except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
            raise DataError(f"cannot use {shown(str(path))}: {error}") from error
        refuse_file(folder, path)
        if evidence and not ours:
            raise DataError(
                f"{path} holds {evidence[0]} that no taopd run wrote (a model, a diagnostic, or another "
                "tool's run); choose another output folder"
            )
        if evidence and not (resume or overwrite):
            raise DataError(
                f"{path} holds another run ({', '.join(evidence[:3])}); choose another output folder, "
                f"{'go on with --resume, ' if command else ''}or start anew with --overwrite"
            )
        if resume and command:
            _refuse_another_command(folder, path, command)
        if overwrite:
            _refuse_to_remove(folder, path, reads, (*_OWNED, *also_owns))
        refuse_if_held(folder)
        with cannot_write_to(path):
            _try_writing(folder)
        return folder

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        also_owns: Sequence[str] = (),
    ) -> "RunFolder":
        """Claim `path` for a run: make it if it is missing, refuse it if it holds another run.

        Args:
            resume: accept a folder that holds a run, and keep what is in it.
            overwrite: remove what the earlier run wrote; a file that no run writes stays, and is
                named in the log.
            also_owns: glob patterns of further names, directly inside the folder, that this kind of
                run writes.

        Raises: as `check`.
        """
        folder = cls.check(path, resume=resume, overwrite=overwrite, also_owns=also_owns)
        with cannot_write_to(path):
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite and (folder / MARKER).exists():
                _empty(folder, (*_OWNED, *also_owns))
            _tidy(folder)
            write_json(folder / MARKER, {"taopd": installed_version("taopd")})
        return cls(path=folder)

    def newest_checkpoint(self) -> Path | None:
        """Return the whole checkpoint with the highest step, or None; newer ones are named in the log."""
        found, passed_over = newest_complete(self.path)
        for line in passed_over:
            logger.warning("%s: %s", self.path, line)
        return found


def refuse_file(folder: Path, called: object) -> None:
    """Refuse an output folder that is a file; `called` is how the user wrote it."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{called} is a file; the output must be a folder")


@contextmanager
def cannot_write_to(path: str | Path) -> Iterator[None]:
    """Context that turns what the system says of a folder into a DataError with path and reason."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, TaopdError):
            raise
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot write to {shown(str(path), 300)}: {why}") from error


@contextmanager
def unclaimed_on_error(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Context that removes these files of a claimed folder if it fails: the same command works again.

    Only for what is written in one go, when the work is done.
    """
    try:
        yield
    except BaseException:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink()
        raise


def _try_writing(folder: Path) -> None:
    """Make a folder and remove it, in this one or where it would be made.

    Rights alone do not tell: root has all of them, also where the system has no room for a file (/proc).
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    Path(tempfile.mkdtemp(prefix=".taopd-", dir=place)).rmdir()


def _refuse_another_command(folder: Path, path: str | Path, command: str) -> None:
    """Refuse to go on in a folder of another command, whose files would be mixed with its own."""
    beside = folder / CONFIG_BESIDE_MODEL
    try:
        config = read_document(beside if beside.is_file() else folder / "config.json")
    except DataError:  # none yet, or one that whoever resumes reads itself
        return
    found = config.get("command", command) if isinstance(config, dict) else command
    if found != command:
        raise DataError(
            f"{path} holds a run of `taopd {found}`, which this command cannot resume; choose another "
            "output folder"
        )


def _refuse_to_remove(
    folder: Path, path: str | Path, reads: Iterable[object], owned: Sequence[str]
) -> None:
    """Refuse to empty a folder of what the new run reads."""
    removed = [found.resolve() for pattern in owned for found in folder.glob(pattern)]
    for name in reads:
        if not isinstance(name, str | Path) or not os.path.exists(name):
            continue
        there = Path(name).resolve()
        if there == folder.resolve() or any(there.is_relative_to(found) for found in removed):
            raise DataError(
                f"{path} holds {name}, which is read here and which --overwrite would remove; choose "
                "another output folder"
            )


def _empty(folder: Path, patterns: Sequence[str]) -> None:
    for pattern in (*patterns, "README.md"):
        for found in folder.glob(pattern):
            if pattern == "README.md" and not is_model_card(found):
                continue
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink(missing_ok=True)
    foreign = sorted({found.name for found in folder.iterdir()} - {LOCK, HOLDER})
    if foreign:
        logger.warning("%s: left in place, no run writes them: %s", folder, ", ".join(foreign))


def _tidy(folder: Path) -> None:
    """Remove what a killed run left unfinished; nobody reads it."""
    for pattern in (PARTIAL, MODEL_PARTIAL, ".checkpoint-*-old", ".model-old"):
        for found in folder.glob(pattern):
            shutil.rmtree(found, ignore_errors=True)
    for found in folder.glob(".*.tmp"):
        found.unlink(missing_ok=True)


def template_options(model: str | Path) -> dict[str, Any]:
    """`chat_template_kwargs` of the run that a model's folder is of; empty for any other model.

    Raises:
        DataError: the run's settings cannot be read.
    """
    place = expanded(model)
    # The folder `model`, a checkpoint, or the run's own folder.
    run = next((each for each in (place, place.parent) if (each / MARKER).is_file()), None)
    if run is None:
        return {}
    beside = run / CONFIG_BESIDE_MODEL
    file = beside if beside.is_file() else run / "config.json"
    found = read_document(file) if file.is_file() else {}
    return dict(found.get("chat_template_kwargs") or {})


def is_model_card(path: Path) -> bool:
    """Whether transformers wrote this README.md beside a checkpoint, and not the user."""
    # The user's own may be anything, and then it stays.
    return path.is_file() and b"generated_from_trainer" in path.read_bytes()
