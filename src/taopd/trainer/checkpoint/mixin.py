"""A mixin for `transformers.Trainer`: atomic checkpoints without pickle, and bitwise resume.

transformers writes into the final folder, so that a killed run leaves an incomplete one; deletes the older
one before the newer is known to be good; and pickles optimizer, scheduler, random state and settings. Here a
checkpoint is written to a temporary folder, sealed (`runs.checkpoints`) and renamed. Then older ones go.

Under FSDP2 every process writes its own shards (`checkpoint.fsdp`), with DeepSpeed files that only DeepSpeed
can read; both are sealed and renamed like the rest. All processes must see one folder.
"""

import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from taopd.errors import ConfigError, DataError
from taopd.runs.checkpoints import (
    OPTIMIZER,
    PARTIAL,
    PREFIX,
    STATE,
    Layout,
    newest_complete,
    num_processes_of,
    seal,
    why_incomplete,
)
from taopd.runs.lock import hold
from taopd.runs.paths import replace_folder
from taopd.trainer.build.given_student import GivenStudent
from taopd.trainer.checkpoint.failure import interrupted, require_finite_weights, stopped
from taopd.trainer.checkpoint.fsdp import (
    layout_of,
    load_optimizer,
    load_weights,
    save_optimizer,
    save_weights,
)
from taopd.trainer.checkpoint.process_state import RankState
from taopd.trainer.checkpoint.renamed import load_renamed
from taopd.trainer.checkpoint.savable import saves_what_came
from taopd.trainer.checkpoint.state_file import load_tree, save_tree
from taopd.trainer.checkpoint.steps_done import named_folder, refuse_fewer

logger = logging.getLogger(__name__)


class AtomicCheckpoints(Trainer):
    """Mixin over `transformers.Trainer`; `TeachabilityTrainer` sets `rank_state` and `_given`."""

    rank_state: RankState
    _given: GivenStudent
    average: Any = None
    """A `MovingAverage`, where the teacher is one."""
    checked: Path | None = None
    """A checkpoint whose files are already verified; `train` does not verify it again."""
    accepts_changes: bool = True
    """Other teachers or prompts in a resumed run are a warning; `taopd train` refuses them."""
    go_on: str = "go on with trainer.train(resume_from_checkpoint=True)"
    """What to do after a failure where there is a checkpoint; a command names its flag."""
    begin_anew: str = "start again"
    """What to do where there is none."""
    _sampler: Any = None
    """TRL's, of the training prompts; None for a stream."""
    _partial: str | None = None
    """Where a checkpoint is being written."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a step that fails ends the run with one message and a checkpoint to resume from.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one.

        Raises:
            DataError: the checkpoint is damaged or of another kind.
            ResourceError: memory or disk ran out. NumericsError, TeacherUnavailable: see the trainer.
        """
        # One process writes the folder; the others of this run follow it.
        alone = hold(Path(self.args.output_dir)) if self.args.process_index == 0 else nullcontext()
        try:
            with alone:
                checkpoint = self._resolve(resume_from_checkpoint)
                refuse_fewer(self.args, checkpoint)
                if self.args.world_size > 1:
                    self.rank_state.signals.keep()
                try:
                    done = super().train(checkpoint, *args, **kwargs)
                    require_finite_weights(self)  # No step comes after the last update to find it.
                    return done
                except KeyboardInterrupt:
                    interrupted(self)
                    raise
        except Exception as error:
            failure = stopped(self, error)
            if failure is None:
                raise
            raise failure from error
        finally:
            self._partial = None
            self.rank_state.signals.end()

    def _resolve(self, named: Any) -> str | None:
        """The folder of a complete checkpoint; verified by the first process, the same for all."""
        if named is None or named is False:
            return None
        folder = Path(self.args.output_dir) if named is True else named_folder(named)
        # The command has verified it before it loaded the models: hashing a checkpoint twice takes minutes.
        if self.checked == folder:
            return str(folder)
        if named is not True and not folder.is_dir():
            raise DataError(f"nothing to resume from: no such folder: {folder}")
        answer = agreed(self.args, self.layout, folder, newest=named is True)
        for line in answer[1]:
            logger.warning("%s", line)
        if answer[0] is None:
            why = "; ".join(answer[1]) or f"{folder} has no checkpoint"
            raise DataError(f"nothing to resume from: {why}")
        return str(answer[0])

    @property
    def layout(self) -> Layout:
        """How this run's state is distributed over its processes."""
        return layout_of(self.accelerator)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed after its last step is resumed for its student alone; transformers would
        # take one more step.
        if not 0 < self.state.max_steps <= self.state.global_step:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The step is complete, callbacks included: an interrupt that waited for it can be answered.
        signals = self.rank_state.signals
        signals.release()
        if self.args.world_size > 1 and (number := signals.agreed(self.accelerator)):
            interrupted(self, together=True)
            signals.end(number)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # -- saving -----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._partial or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        require_finite_weights(self)  # It would take the place of a good one.
        run, name = super()._get_output_dir(trial), f"{PREFIX}{self.state.global_step}"
        self._partial = os.path.join(run, PARTIAL)
        try:
            if self.args.should_save:
                shutil.rmtree(self._partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its part
            if self.args.should_save:
                self._publish(Path(self._partial) / name, Path(run) / name)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(run, self.args.save_total_limit, best, use_mtime=True)
            self.accelerator.wait_for_everyone()
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        finally:
            self._partial = None

    def _publish(self, partial: Path, final: Path) -> None:
        """Seal a checkpoint and give it its name."""
        # transformers noted the name under which it was being written.
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(partial / STATE))
        seal(
            partial,
            step=self.state.global_step,
            num_processes=self.args.world_size,
            layout=self.layout,
        )
        replace_folder(partial, final)
        partial.parent.rmdir()

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        with saves_what_came():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle of the settings that nothing reads; config.json of the run has them.
            (folder / "training_args.bin").unlink(missing_ok=True)
            inner = self.accelerator.unwrap_model(self.model)
            self._given.finish_saving(folder, inner, checkpoint=self._partial is not None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the full student; under FSDP2 it is gathered first.

        Within a checkpoint of a run with `fsdp_state_dict_type: SHARDED_STATE_DICT` there are shards alone.
        """
        if self.layout == "sharded" and not _internal_call:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.layout == "deepspeed":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would pickle schedule and scaler; both are plain numbers.
        scaler = self.accelerator.scaler
        assert self.optimizer is not None and self.lr_scheduler is not None
        others = {
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        folder = Path(output_dir)
        if self.layout == "sharded":
            folder.mkdir(parents=True, exist_ok=True)
            rank = self.args.process_index
            save_weights(folder, self.model, rank, trained_only=self._has_adapters)
            save_optimizer(folder, self.optimizer, rank, others)
        elif self.args.should_save:
            save_tree(folder / OPTIMIZER, {"optimizer": self.optimizer.state_dict()} | others)
        if self.average is not None and self.args.should_save:
            self.average.save(folder)

    def _save_scaler(self, output_dir: str) -> None:
        if self.layout == "deepspeed":
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        # A process may come here before the first one has made the folder.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.rank_state.save(Path(output_dir))

    # -- resuming ---------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._replay_epochs()
        if self.layout == "deepspeed" or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        if self.layout == "sharded":
            state = load_optimizer(Path(checkpoint), self.optimizer, *self._processes(checkpoint))
        else:
            state = load_tree(Path(checkpoint) / OPTIMIZER)
            try:
                self.optimizer.load_state_dict(state["optimizer"])
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"{checkpoint} is of another optimizer, or of other weights that trained: {error}"
                ) from error
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        where = Path(resume_from_checkpoint), self.model
        if self.layout == "sharded":
            load_weights(*where, *self._processes(where[0]), trained_only=self._has_adapters)
        elif not load_renamed(*where):
            super()._load_from_checkpoint(self._given.resumed_from(resume_from_checkpoint), model)

    def _load_best_model(self) -> None:
        if self.layout == "deepspeed":
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _processes(self, checkpoint: str | Path) -> tuple[int, int, int]:
        """Index of this process, number of processes that wrote the checkpoint, and number of this run's."""
        saved = num_processes_of(Path(checkpoint))
        return self.args.process_index, saved, self.args.world_size

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "peft_config")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.layout == "deepspeed":
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.rank_state.restore(Path(checkpoint))

    def _replay_epochs(self) -> None:
        """Advance the sampler's generator by the epochs that the run has finished."""
        sampler = self._sampler
        for _ in range(int(self.state.epoch or 0) if sampler and sampler.shuffle else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def agreed(
    args: TrainingArguments, layout: Layout, folder: Path, *, newest: bool
) -> tuple[Path | None, list[str]]:
    """A complete checkpoint, or None, and what is wrong with others; the first process reads, all get it.

    Args:
        folder: the checkpoint, or with `newest` the run whose newest complete one is meant.
    """
    found: list[Any] = [None, []]
    if args.process_index == 0 and newest:
        found = list(newest_complete(folder, layout))
    elif args.process_index == 0:
        problem = why_incomplete(folder, layout)
        found = [None if problem else folder, [f"{folder}: {problem}"] if problem else []]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0], found[1]
