"""What a run folder says of a run as a whole: settings, environment, results, and the look before it began.

`taopd train` writes these files, and a trainer in Python does where nobody else does: one folder, whoever
started the run. While it trains, `callbacks.MetricsWriter` and `rollout_log` write the rest.
"""

import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers.trainer
from transformers import Trainer, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

import taopd
from taopd.errors import DataError
from taopd.runs.checkpoints import PREFIX, set_aside
from taopd.runs.folder import CONFIG_BESIDE_MODEL, MARKER, is_model_card
from taopd.runs.jsonl import write_json
from taopd.runs.redaction import redact_document
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document
from taopd.runs.versions import installed_version
from taopd.trainer.checkpoint.resume import changed_settings
from taopd.trainer.environment import environment
from taopd.trainer.model_card import PAPER, completed
from taopd.trainer.settings.filled import given_otherwise, is_filled
from taopd.trainer.settings.methods import running

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

QUICK_TOKENS = 256
"""Tokens of a completion in the look before training."""

_RESOLVED = {
    *("accelerator_config", "activation_checkpointing", "bf16", "dataloader_pin_memory"),
    *("debug", "disable_tqdm", "pad_to_multiple_of", "report_to"),
}
"""Settings to which TRL and transformers give another value than the default, by the machine."""

logger = logging.getLogger(__name__)


class RunRecord(TrainerCallback):
    """Writes `config.json`, `env.json` and `check.json` when training begins.

    Args:
        check: what `check.json` holds, if there was a look.
    """

    def __init__(self, check: dict[str, Any] | None = None) -> None:
        self._check = check
        self.resumed_from: str | None = None

    # Not before: a checkpoint that cannot be resumed leaves the folder as it was.
    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        resolved = {"command": "train", "changed": changed_by_caller(args)} | args.to_dict()
        if state.global_step:
            self.resumed_from = f"{PREFIX}{state.global_step}"
            # Another folder than before has no settings yet.
            if (folder / MARKER).exists():
                now = folder, state.global_step, args.to_dict()
                differ = changed_settings(*now, allowed=True)
                resolved |= {"changes": differ} if differ else {}
        else:
            _leave_behind(folder)
        write_json(folder / MARKER, {"taopd": installed_version("taopd")})
        write_json(folder / "config.json", resolved)
        (folder / CONFIG_BESIDE_MODEL).unlink(missing_ok=True)
        about = environment(seed=args.seed, data_seed=args.data_seed)
        write_json(folder / "env.json", about)
        if self._check is not None:
            write_json(folder / "check.json", self._check)


def _leave_behind(folder: Path) -> None:
    """Keep what an earlier run has left in the folder from passing for that of the run that begins."""
    for name in ("results.json", "check.json"):
        (folder / name).unlink(missing_ok=True)
    if earlier := set_aside(folder):
        logger.warning(
            "%s holds checkpoints of an earlier run, the newest %s: they stay, and "
            "resume_from_checkpoint=True passes over them",
            *(folder, earlier[0].name),
        )


def make_room_for_model(folder: Path) -> None:
    """Keep a run's settings where a model's `config.json` is about to take their name."""
    path = folder / "config.json"
    # A model's config knows no budget.
    if path.is_file() and "budget" in (settings := read_document(path, OBJECT)):
        write_json(folder / CONFIG_BESIDE_MODEL, settings)


def changed_by_caller(args: "TeachabilityConfig") -> dict[str, Any] | None:
    """Settings that the caller gave another value than the default, secrets masked; None: not known."""
    given: frozenset[str] = vars(args).get("given", frozenset())
    if not given:  # Made of TRL's own config.
        return None
    # `dataclasses.replace` and parsers name every setting that this version of transformers has.
    if given >= _RESOLVED & {entry.name for entry in fields(args)}:
        given -= _RESOLVED
    found, resolved = given_otherwise(args, given), redact_document(args.to_dict())
    return {name: resolved.get(name, each) for name, each in found.items() if not is_filled(each)}


def write_results(
    trainer: Trainer,
    metrics: dict[str, Any],
    *,
    seconds: float,
    resumed_from: str | None,
    model: str | None,
) -> Path:
    """Write `results.json` and return its path.

    Args:
        seconds: of training; model: folder of the student in the run's, if it was saved.
    """
    args, logs = trainer.args, trainer.state.log_history
    results = {
        "command": "train",
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "resumed_from": resumed_from,
        "selector": args.selector,
        "budget": args.budget,
        "loss": args.loss,
        "seed": args.seed,
        "model": model,
        "train": metrics,
        "last_log": next((log for log in reversed(logs) if "loss" in log), None),
    }
    path = Path(str(args.output_dir)) / "results.json"
    write_json(path, results)
    return path


def look_first(trainer: Trainer) -> dict[str, Any]:
    """The check before training: warnings into the log; returns what `check.json` holds."""
    found = taopd.check(trainer, max_tokens=QUICK_TOKENS)
    for verdict in found if trainer.is_world_process_zero() else ():
        if verdict.level != "pass":
            logger.warning("check: %s", verdict.line)
    found.refuse_fail(
        "`print(trainer.check())` shows all items, `train(check=False)` starts without it"
    )
    return found.as_dict()


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder whose `config.json` is another one's: a model is lost without its own."""
    if (folder / "config.json").exists() and not (folder / MARKER).exists():
        raise DataError(
            f"{folder} holds config.json that no taopd run wrote (a model, or another tool's run), and the "
            "run's would replace it; choose another output_dir"
        )


class RecordedRuns(Trainer):
    """Mixin over `transformers.Trainer`: a look before the first step, and the files of a run around it."""

    writes_record = True
    """`train` leaves config.json, env.json, results.json and a model card; not where a command does."""
    _partial: str | None
    """Where `AtomicCheckpoints` is writing a checkpoint."""
    _paper = PAPER  # Of the model card; TRL's class has that of its own method.

    def train(self, resume_from_checkpoint=None, *args, check: bool = True, **kwargs):
        """Train as TRL's trainer does, and leave a run folder that `taopd report` reads.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one.
            check: look at the pair first, as `taopd train` does, where the run begins; a fail stops it.

        Raises:
            ConfigError: the check failed. For others see `AtomicCheckpoints.train`.
        """

        def train():
            result = super(RecordedRuns, self).train(resume_from_checkpoint, *args, **kwargs)
            # Whatever kept the batches away, what would be saved now is not a distilled student.
            if self.state.global_step == 0:
                raise DataError(
                    "training ended without a step: the training set gave no generation batch, or a "
                    "callback stopped the run before its first step"
                )
            return result

        if self.train_dataset is None:
            raise DataError("there are no prompts to train on: pass train_dataset")
        if self.writes_record and self.is_world_process_zero():
            _refuse_foreign(Path(self.args.output_dir))
        if self.args.resume_from_checkpoint and not resume_from_checkpoint:
            logger.warning(
                "resume_from_checkpoint=%r of the settings is not read by train(): the run begins anew; to "
                "go on, call train(resume_from_checkpoint=...)",
                self.args.resume_from_checkpoint,
            )
        if self.args.push_to_hub and self.args.log_rollouts:
            logger.warning(
                "push_to_hub uploads the run folder, with prompts and completions in rollouts.jsonl; "
                "log_rollouts=0 leaves them out"
            )
        looked = look_first(self) if check and not resume_from_checkpoint else None
        if not self.writes_record:
            return train()
        record, started = RunRecord(looked), time.perf_counter()
        self.add_callback(record)
        try:
            result = train()
        finally:
            self.remove_callback(record)
        if self.is_world_process_zero():
            seconds, named = time.perf_counter() - started, record.resumed_from
            write_results(self, result.metrics, seconds=seconds, resumed_from=named, model=None)
            if not self._has_own_readme:
                self.create_model_card()
        return result

    def check(self):
        """What `taopd check` looks at, for this trainer before it trains; see `taopd.check`."""
        # The check lies above this room: it is asked for by its public name.
        return taopd.check(self)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        target = Path(output_dir or self.args.output_dir)
        if self.args.should_save and target == Path(self.args.output_dir):
            make_room_for_model(target)
        super().save_model(output_dir, _internal_call)

    @property
    def _has_own_readme(self) -> bool:
        """The run folder has a README that no trainer wrote."""
        card = Path(self.args.output_dir) / "README.md"
        return card.exists() and not is_model_card(card)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            name = f"{PREFIX}{self.state.global_step}"
            self._push_from_checkpoint(str(Path(self.args.output_dir) / name))

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        # The upload goes on in the background: a checkpoint that is being written is not where it stays.
        if self._partial is not None:
            return
        if self.is_world_process_zero():
            make_room_for_model(Path(self.args.output_dir))
        # transformers pickles the settings, hub_token too. No upload takes a name that begins with "_".
        name, hidden = transformers.trainer.TRAINING_ARGS_NAME, "_training_args.bin"
        transformers.trainer.TRAINING_ARGS_NAME = hidden
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            transformers.trainer.TRAINING_ARGS_NAME = name
            (Path(self.args.output_dir) / hidden).unlink(missing_ok=True)

    def create_model_card(self, model_name=None, *args, **kwargs) -> None:
        # With every checkpoint TRL writes one that nobody asked for.
        if self._partial is not None and self._has_own_readme:
            return
        if running(self.args) == "full":  # TRL's own method, which its card then names and cites
            self._name, self._paper = DistillationTrainer._name, DistillationTrainer._paper
        # As TRL names the cards that it writes itself.
        name = Path(self.hub_model_id or Path(self.args.output_dir).resolve()).name
        super().create_model_card(model_name or name, *args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or not path.is_file():
            return
        base = get_config_model_id(self.model.config) or ""
        card = completed(path.read_text(encoding="utf-8"), self.args, base)
        path.write_text(card, encoding="utf-8")
