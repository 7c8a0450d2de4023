"""Errors that end a run: one message, and a checkpoint for `--resume` where one can be saved."""

import logging
from pathlib import Path
from typing import Any

import torch

from taopd.distributed.sharding import full_tensor
from taopd.errors import ConfigError, NumericsError, ResourceError, TaopdError
from taopd.runs.checkpoints import newest_complete, step_of
from taopd.runs.disk import cannot_write, first_line

logger = logging.getLogger(__name__)

_LOWER = (
    "lower per_device_train_batch_size (raise gradient_accumulation_steps by the same factor), "
    "max_completion_length or prefix_memory_mib, or set gradient_window or gradient_checkpointing; "
    "`taopd plan` says what a step needs"
)


def stopped(trainer: Any, error: Exception) -> TaopdError | None:
    """The error that ends a training run, after a checkpoint was saved if possible; None for a bug.

    A checkpoint is written only where all processes stop together and no optimizer update is in progress.
    """
    step = trainer.state.global_step
    if is_out_of_memory(error):
        where = _save(trainer, together=False)
        return ResourceError(
            f"out of memory in step {step + 1} ({first_line(error)}): {_LOWER}. {where}"
        )
    if (what := cannot_write(error)) is not None:
        return ResourceError(
            f"step {step + 1}: cannot write {what}. Nothing is left half-written; make room or mend the "
            f"folder. {_newest(trainer)}"
        )
    if isinstance(error, ImportError):
        return ConfigError(
            f"the settings need a package that is not installed: {first_line(error)}"
        )
    if (what := nan_in_sampling(error)) is not None:
        # Nobody wants to keep weights that give NaN.
        return NumericsError(f"step {step + 1}: {what}. {_newest(trainer)}")
    if isinstance(error, KeyError) and "metric_for_best_model" in str(error):
        logs = trainer.state.log_history
        losses = dict.fromkeys(name for log in logs for name in log if _is_loss(name))
        # All processes evaluate, and look at the same metrics.
        return ConfigError(
            f"metric_for_best_model={trainer.args.metric_for_best_model!r} is no metric of the evaluation; "
            f"take {' or '.join(losses)}. {_save(trainer, together=True)}"
        )
    if isinstance(error, NumericsError) or (isinstance(error, TaopdError) and error.together):
        end = "" if str(error).endswith("?") else "."
        return type(error)(f"{error}{end} {_save(trainer, together=error.together)}")
    return None


def interrupted(trainer: Any, *, together: bool = False) -> None:
    """Save the finished steps of a run that is being interrupted, if that is possible; says where they are.

    A second interrupt ends the saving: nothing half-written stays.

    Args:
        together: all processes are here, at the end of the same step.
    """
    step = trainer.state.global_step
    newest = newest_complete(Path(trainer.args.output_dir), trainer.layout)[0]
    # A scheduler gives seconds: what is on disk is not written again. All processes save or none: the first
    # one may see a folder that others do not see yet.
    if not together and newest is not None and step_of(newest) == step:
        return
    first = trainer.is_world_process_zero()
    if first and step and (together or trainer.args.world_size == 1):
        again = "" if together else "; interrupt again to leave without"
        logger.warning("interrupted: saving step %d%s", step, again)
    words = _save(trainer, together=together)
    if first:
        logger.warning("%s", words)


def nan_in_sampling(error: BaseException) -> str | None:
    """The words for what torch's sampler says of NaN, None for another error."""
    if not isinstance(error, RuntimeError) or "probability tensor contains" not in str(error):
        return None
    return "the student's logits are NaN or infinite in sampling; check its weights, dtype and learning rate"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)


def _save(trainer: Any, *, together: bool) -> str:
    step = trainer.state.global_step
    alone = trainer.args.world_size == 1
    if step == 0 or trainer.rank_state.updating or not (together or alone):
        return _newest(trainer)
    if not weights_are_finite(trainer.model):
        # A run that goes on from them ends at once.
        return f"The weights are NaN or infinite and are not saved. {_newest(trainer)}"
    try:
        trainer.model_wrapped.zero_grad()
        trainer._save_checkpoint(trainer.model, trial=None)
    except Exception as problem:
        if not (cannot_write(problem) or is_out_of_memory(problem)):
            raise
        logger.warning("the state could not be saved: %s", first_line(problem))
        return _newest(trainer)
    path = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    if trainer.args.save_only_model:
        return (
            f"The student of {step} steps is in {path}, from which no run goes on (save_only_model): "
            f"{trainer.begin_anew}"
        )
    return f"{step} steps are saved in {path}: {trainer.go_on}"


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether what trains is; the same answer in all processes, which ask together."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    return bool(full_tensor(torch.nn.utils.get_total_norm(weights)).isfinite())


def require_finite_weights(trainer: Any) -> None:
    """Refuse to go on with weights of which nothing good can come.

    Raises:
        NumericsError: names the step whose update made them.
    """
    if not weights_are_finite(trainer.model):
        step = trainer.state.global_step
        raise NumericsError(
            f"step {step}: the update made weights NaN or infinite; lower learning_rate"
        )


def _newest(trainer: Any) -> str:
    newest, passed_over = newest_complete(Path(trainer.args.output_dir), trainer.layout)
    for line in passed_over:
        logger.warning("%s", line)
    if newest is None:
        return f"There is no checkpoint yet: {trainer.begin_anew}"
    return f"The newest checkpoint is {newest}: {trainer.go_on}"


def _is_loss(name: str) -> bool:
    """Of an evaluation: eval_loss, or eval_NAME_loss of one set among several."""
    return name.startswith("eval_") and name.endswith("_loss")
