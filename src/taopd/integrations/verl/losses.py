"""verl's distillation losses with a weight for every token, registered under names of their own.

`taopd_forward_kl_topk` is verl's KL(teacher || student) on the teacher's list. `taopd_k1` is its log p_S less
log p_T of the sampled token, the reward of a policy gradient. verl's teacher sends either the log-prob of the
sampled token or a list; here it is read from the list, so tokens that the list lacks get no weight.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    compute_forward_kl_topk,
    register_distillation_loss,
)
from verl.trainer.ppo.core_algos import kl_penalty
from verl.workers.utils.padding import no_padding_2_padding

from taopd.errors import DataError, ShapeError
from taopd.integrations.verl.selection import WEIGHTS
from taopd.integrations.verl.token_signals import teacher_at

LOSS_MODES = ("taopd_forward_kl_topk", "taopd_k1")
"""Values of `distillation.distillation_loss.loss_mode`."""


@register_distillation_loss(DistillationLossSettings(names="taopd_forward_kl_topk", use_topk=True))
def weighted_forward_kl_topk(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `forward_kl_topk` of every response token [B, T], nats, times its weight; and verl's metrics."""
    losses, metrics = compute_forward_kl_topk(
        config=config, distillation_config=distillation_config, model_output=model_output, data=data
    )
    return weighted(losses, data), metrics


@register_distillation_loss(DistillationLossSettings(names="taopd_k1", use_topk=True))
def weighted_k1(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Any]]:
    """verl's k1 of the sampled tokens [B, T], nats, times its weight; 0 where the list lacks the token."""
    student = no_padding_2_padding(model_output["log_probs"], data)
    ids = no_padding_2_padding(data["teacher_ids"], data)
    logprobs = no_padding_2_padding(data["teacher_logprobs"], data).to(student.dtype)
    sampled = _dense(data["responses"], 0)
    teacher, _ = teacher_at(
        ids.flatten(0, 1), logprobs.flatten(0, 1), sampled.to(ids.dtype).flatten().unsqueeze(1)
    )
    teacher = teacher.view_as(student)
    losses = kl_penalty(logprob=student, ref_logprob=teacher, kl_penalty="k1")
    return weighted(losses, data), {}


def weighted(losses: Tensor, data: TensorDict) -> Tensor:
    """Losses [B, T] times the batch's weights; a token without weight is 0 whatever its loss.

    Raises:
        DataError: a batch in which nothing was chosen. ShapeError: weights of another shape.
    """
    if WEIGHTS not in data:
        raise DataError(
            f"the batch has no {WEIGHTS}: this loss needs trainer.v1.trainer_mode=taopd_sync, which "
            "chooses the tokens"
        )
    weights = _dense(data[WEIGHTS], 0.0).to(losses)
    if weights.shape != losses.shape:
        raise ShapeError(
            f"{WEIGHTS}: expected {list(losses.shape)}, got {list(weights.shape)}; they are jagged like "
            "the response mask"
        )
    return torch.where(weights != 0, losses, 0.0) * weights


def _dense(values: Tensor, padding: float) -> Tensor:
    return values.to_padded_tensor(padding) if values.is_nested else values
