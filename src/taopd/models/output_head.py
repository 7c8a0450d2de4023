"""The output head of a model as plain tensors, as the model's own forward applies it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from taopd.distributed.sharding import full_tensor
from taopd.errors import ConfigError
from taopd.kernels import Head

_SOFTCAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
"""Gemma and its relatives, RecurrentGemma, xLSTM."""
_MULTIPLIERS = "logit_scale", "output_multiplier", "lm_head_multiplier"
"""Cohere, Muse, Falcon H1."""
_DIVISORS = "logits_scaling", "logits_mup_width_multiplier"
"""Granite and MiniCPM3, Inkling; HyperCLOVA X multiplies by the first."""
_PLAIN = "mpt", "gemma3"
"""Families with such a number in their configs that their forwards leave out."""


def inside_peft(model: Any) -> Any:
    """The transformers model inside peft's wrapper, adapters in place; any other model as it is."""
    # peft's own `base_model` is a wrapper too.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """The model's output projection over the first `vocab_size` ids, as its forward would apply it.

    A sharded weight (FSDP2, ZeRO-3) is gathered here, once, and not per chunk. Scale and soft cap are read
    from the text config under the names that the model families use. `own_forward` finds what else a forward
    does.

    Raises:
        ConfigError: no head, or an adapter on it that is not merged.
    """
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no output head to read: choose a causal language model"
        )
    # An adapter layer shows the weight below it: the adapter itself would be left out without a word.
    if hasattr(head, "base_layer") and not (head.merged or head.disable_adapters):
        raise ConfigError(
            "the model has an adapter on its output head, which would be left out: merge the adapter "
            "(merge_and_unload) and save the model"
        )
    bias = getattr(head, "bias", None)
    # Read from the config, because the model's forward applies them outside its head module.
    scale, softcap = _scale_and_cap(model.config)
    return Head(
        weight=full_tensor(head.weight)[:vocab_size],
        bias=None if bias is None else full_tensor(bias)[:vocab_size],
        scale=scale,
        softcap=softcap,
    )


def head_rows(config: PretrainedConfig) -> int:
    """Rows of a model's head, but for those that its forward cuts off: its own padding."""
    text = config.get_text_config()
    # Inkling's heads are padded.
    return min(text.vocab_size, getattr(text, "unpadded_vocab_size", None) or text.vocab_size)


def require_decoder(name: str, config: PretrainedConfig) -> None:
    """Refuse a model that reads its prompt with an encoder.

    Raises:
        ConfigError: names the kind of model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"the {name} is an encoder and a decoder ({config.model_type}): choose a causal language model"
        )


def require_backbone(name: str, model: PreTrainedModel) -> None:
    """Refuse a model whose last states cannot be had without its logits.

    Raises:
        ConfigError: names the model.
    """
    inner = inside_peft(model)
    require_decoder(name, inner.config)
    if inner.base_model is inner:
        raise ConfigError(
            f"the {name} {type(inner).__name__} gives no states apart from its logits (its base_model is the "
            "model itself): choose another architecture"
        )
    # Virtual tokens come before the prompt in peft's own forward alone.
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ConfigError(
            f"the {name} has virtual tokens (prompt, prefix or p-tuning), which scoring cannot read: use a "
            "weight-based adapter such as LoRA"
        )


def merge_head_adapter(model: PreTrainedModel) -> None:
    """Merge an adapter on the output head of a frozen model into the head, which then is one matrix."""
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer") and not head.merged:
        # The matrix may also be the input embedding, which the adapter does not change.
        base = head.get_base_layer()
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        head.merge()


def _scale_and_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """Multiplier and soft cap of the logits."""
    text = config.get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        if config.model_type in _PLAIN:
            return None
        return next((number for name in names if (number := getattr(text, name, None))), None)

    multiplier, divisor = float(first(_MULTIPLIERS) or 1.0), float(first(_DIVISORS) or 1.0)
    scale = multiplier * divisor if text.model_type == "hyperclovax" else multiplier / divisor
    return scale, first(_SOFTCAPS)


def head_dtype(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype that a head within the model's forward would compute in."""
    device = hidden.device.type
    # Autocast acts on the modules it wraps; our heads are plain matmuls outside it.
    enabled = torch.is_autocast_enabled(device)
    return hidden.to(torch.get_autocast_dtype(device)) if enabled else hidden
