"""The output head of a model as plain tensors, as the model's own forward applies it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import full_tensor
from taopd.kernels import Head


def read_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """The model's output projection over the first `vocab_size` ids, as its forward would apply it.

    A sharded weight (FSDP2, ZeRO-3) is gathered here, once, and not per chunk. Scale and soft cap are read
    from the text config under the names that the model families use.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias, scale = getattr(head, "bias", None), _logit_scale(config)
    return Head(
        weight=full_tensor(head.weight)[:vocab_size],
        bias=None if bias is None else full_tensor(bias)[:vocab_size],
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config) -> float:
    """Multiplier of the logits; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies by it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def head_dtype(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype that a head within the model's forward would compute in."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    return hidden.to(torch.get_autocast_dtype(device)) if enabled else hidden
