"""The two places where verl is extended: the worker that scores, and the trainer that chooses.

The worker gives the signals in the pass that verl makes for the old log-probs: verl hands a loss function
the student's logits, and in this pass that function is ours. The trainer's mode is `taopd_sync`.
"""

from functools import partial
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from taopd.errors import ConfigError, DataError
from taopd.integrations.verl.losses import LOSS_MODES
from taopd.integrations.verl.selection import (
    FIELDS,
    REDUCTIONS,
    WEIGHTS,
    VerlSettings,
    choose_weights,
)
from taopd.integrations.verl.token_signals import PREFIX, signal_columns

MODE = "taopd_sync"
"""Value of `trainer.v1.trainer_mode`, and the block of `trainer.v1` with our settings."""
TOP_K, EXACT = PREFIX + "top_k", PREFIX + "exact"
"""What the trainer tells the workers about scoring, in the batch's meta data."""


def scoring_loss(
    *,
    k: int,
    exact: bool,
    data: TensorDict,
    model_output: dict[str, Tensor] | None = None,
    student_logits: Tensor | None = None,
    dp_group: Any = None,
    data_format: str = "thd",
) -> Any:
    """In place of verl's loss during scoring: columns [1, N] from the packed logits, then a loss of zero.

    Raises:
        DataError: without the teacher's lists.
    """
    if student_logits is None:
        return torch.zeros(()), {}
    for name in ("teacher_ids", "teacher_logprobs"):
        if name not in data:
            raise DataError(
                f"the batch has no {name}: set distillation.enabled=true, with one of the loss modes "
                f"{', '.join(LOSS_MODES)}"
            )
    tokens = data["input_ids"].values()
    columns = signal_columns(
        student_logits.squeeze(0),
        data["teacher_ids"].values(),
        data["teacher_logprobs"].values(),
        tokens.roll(-1),
        k=k,
        exact=exact,
    )
    return {name: values.unsqueeze(0) for name, values in columns.items()}


class SelectiveWorker(ActorRolloutRefWorker):
    """verl's actor; its pass for the old log-probs also gives the signals."""

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict | None:
        k = tu.get_non_tensor_data(data, TOP_K, 0)
        reference = tu.get_non_tensor_data(data, "no_lora_adapter", False)
        if not k or reference:
            return super().compute_log_prob(data)
        exact = tu.get_non_tensor_data(data, EXACT, False)
        tu.assign_non_tensor(
            data, compute_loss=True, distillation_use_topk=True, distillation_only=False
        )
        trained = self.actor.loss_fn
        self.actor.set_loss_fn(partial(scoring_loss, k=k, exact=exact))
        try:
            return super().compute_log_prob(data)
        finally:
            self.actor.set_loss_fn(trained)


def read_settings(config: Any) -> VerlSettings:
    """Our settings from verl's config, once what verl is told to do fits them.

    Raises:
        ConfigError: names the setting of verl's or ours, and what to set it to.
    """
    actor, distillation = config.actor_rollout_ref.actor, config.get("distillation")
    loss = None if distillation is None else distillation.distillation_loss
    if loss is None or not distillation.enabled or loss.loss_mode not in LOSS_MODES:
        raise ConfigError(
            f"trainer_mode={MODE} needs distillation.enabled=true and distillation.distillation_loss."
            f"loss_mode={' or '.join(LOSS_MODES)}"
        )
    rollout_correction = config.algorithm.get("rollout_correction") or {}
    rules = (
        (actor.strategy in ("fsdp", "fsdp2"), "actor_rollout_ref.actor.strategy=fsdp or fsdp2"),
        (
            actor.get("ulysses_sequence_parallel_size", 1) == 1
            and actor.fsdp_config.ulysses_sequence_parallel_size == 1,
            "ulysses_sequence_parallel_size=1, in actor_rollout_ref.actor and its fsdp_config",
        ),
        (
            not config.actor_rollout_ref.model.get("use_fused_kernels", False),
            "actor_rollout_ref.model.use_fused_kernels=false",
        ),
        (
            not rollout_correction.get("bypass_mode", False),
            "algorithm.rollout_correction.bypass_mode=false",
        ),
        (
            actor.loss_agg_mode in REDUCTIONS,
            f"actor_rollout_ref.actor.loss_agg_mode={' or '.join(REDUCTIONS)}",
        ),
        # verl would clamp after the weights, and so change what the clamp means.
        (loss.loss_max_clamp is None, "distillation.distillation_loss.loss_max_clamp=null"),
        # The gradient of log p_S - log p_T itself does not know the teacher.
        (
            loss.loss_mode != "taopd_k1" or loss.use_policy_gradient,
            "distillation.distillation_loss.use_policy_gradient=true, for taopd_k1",
        ),
    )
    for holds, setting in rules:
        if not holds:
            raise ConfigError(f"trainer_mode={MODE} needs {setting}")
    block = config.trainer.v1.get(MODE) or {}
    values = OmegaConf.to_container(block, resolve=True) if OmegaConf.is_config(block) else block
    return VerlSettings.read(values, topk=loss.topk)


@register_trainer(MODE)
class SelectiveTrainer(PPOTrainerSync):
    """verl's synchronous trainer that weighs the tokens of every batch before the actor's update."""

    def __init__(self, config: Any):
        self.settings = read_settings(config)
        super().__init__(config)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if "actor" in str(role):
                self.role_worker_mapping[role] = ray.remote(SelectiveWorker)

    def _compute_old_log_prob(self, batch, metrics: dict):
        settings = self.settings
        batch.extra_info.update({TOP_K: settings.score_top_k, EXACT: settings.signals == "exact"})
        return super()._compute_old_log_prob(batch, metrics)

    def _update_actor(self, batch, metrics: dict):
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**where, select_fields=list(FIELDS))
        actor = self.config.actor_rollout_ref.actor
        loss = self.config.distillation.distillation_loss
        weights, chosen = choose_weights(
            data,
            self.settings,
            step=self.global_steps,
            agg_mode=actor.loss_agg_mode,
            on_teacher_list=loss.loss_mode == "taopd_k1",
        )
        batch = tq.kv_batch_put(
            **where, fields=TensorDict({WEIGHTS: weights}, batch_size=len(batch))
        )
        metrics.update(chosen)
        return super()._update_actor(batch, metrics)
