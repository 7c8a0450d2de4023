"""Adapter for verl: its rollouts, teacher, engine and loss, with token selection by taopd.

    VERL_USE_EXTERNAL_MODULES=taopd.integrations.verl python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=taopd_sync +trainer.v1.taopd_sync.budget=0.1 \\
        distillation.distillation_loss.loss_mode=taopd_forward_kl_topk ...

Importing this module registers the trainer and the losses by verl's own registries. A step of verl's then is:

    sample, ask the teacher        verl's; the batch holds `teacher_ids`, `teacher_logprobs` [tokens, topk]
    old log-probs                  verl's pass; the worker's logits also give D, C and H of every token
    choose                         here, on the controller, over the whole batch: all ranks and micro-batches
    update the actor               verl's; each token's distillation loss times its weight

Why weights and not another `response_mask`: verl takes minima over the masked tokens of each micro-batch and
divides by their count in each mini-batch, and both fail where a selection left none. The weights hold the
reduction, so that the loss is the mean over the kept tokens whatever the micro-batches and ranks.

Not here: any loss, engine, teacher or loop. docs/verl.md says what was run and what was not.

Source: verl 0.9.1, `register_trainer`, `register_distillation_loss`, `role_worker_mapping`.
"""

from taopd.errors import ConfigError
from taopd.runs.versions import installed_version

PINNED = "0.9.1"
"""The version of verl whose code this adapter was read against and tested with."""


def check_version() -> None:
    """Refuse a missing verl, or any other than the pinned one.

    Raises:
        ConfigError: says which version to install.
    """
    found = installed_version("verl")
    if found is None:
        raise ConfigError(
            f"taopd.integrations.verl needs verl, which is not installed: pip install verl=={PINNED}"
        )
    if found != PINNED:
        raise ConfigError(
            f"taopd.integrations.verl is written for verl {PINNED} and found {found}: its batches and "
            f"trainer change between versions; pip install verl=={PINNED}"
        )


check_version()

from taopd.integrations.verl.losses import LOSS_MODES  # noqa: E402
from taopd.integrations.verl.selection import VerlSettings  # noqa: E402
from taopd.integrations.verl.trainer import SelectiveTrainer, SelectiveWorker  # noqa: E402

__all__ = [
    "LOSS_MODES",
    "PINNED",
    "SelectiveTrainer",
    "SelectiveWorker",
    "VerlSettings",
    "check_version",
]
