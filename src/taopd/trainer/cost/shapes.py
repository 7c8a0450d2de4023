"""What a plan needs to know of a model, from its config alone: sizes, parameter counts, matmuls.

The counts are formulas and not a walk over an instantiated model, so that a plan for 14 B parameters takes
milliseconds; the tests hold them equal to `sum(p.numel())` of the real class, built without memory.

Known to the last parameter: the families in `FAMILIES`; Qwen3-MoE as a teacher (all experts held, the active
ones computed). Any other decoder is read from the fields that configs have in common; its parameters, and the
weights that a token passes, are counted on an instance without memory. What autograd keeps of its layers is
taken for the usual. A field that is missing is a `ConfigError` that names it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from taopd.errors import ConfigError


class Family(NamedTuple):
    """What a config does not say and the modelling code fixes."""

    qk_norm: bool = False
    qkv_bias: bool | None = None
    """None: `attention_bias` of the config decides, for the output projection as well."""


FIELDS = {
    "hidden_size": ("hidden_size", "d_model", "dim"),
    "intermediate_size": (
        "intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "moe_intermediate_size",
        "n_inner",
    ),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "vocab_size": ("vocab_size",),
}
"""What a shape cannot do without, and what configs call it."""
FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with gated feed-forward layers and grouped-query attention.

    Example:
        >>> SHAPES["Qwen3-0.6B"].num_parameters
        596049920
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    """The head is the embedding's matrix."""
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    num_moe_layers: int = 0
    """Layers with experts in place of the dense feed-forward."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    other_parameters: int = 0
    """Of the body, beside those that the sizes above account for; may be negative."""
    other_active_weights: int = 0
    """Entries of linear layers that a token passes, likewise."""
    latent_size: int = 0
    """Entries of a token in a layer's cache, where keys and values are cached compressed (MLA)."""
    num_sliding_layers: int = 0
    """Layers that cache the last `sliding_window` - 1 tokens alone."""
    sliding_window: int = 0

    @staticmethod
    def from_config(config: Any, name: str = "") -> "ModelShape":
        """Read a transformers `PretrainedConfig`."""
        config = config.get_text_config()
        family = FAMILIES.get(config.model_type)
        sizes: dict[str, Any] = {field: _read(config, field, name) for field in FIELDS}
        known: dict[str, Any] = sizes | {
            "name": name or config.model_type,
            "num_kv_heads": _kv_heads(config, sizes),
            "head_dim": _head_dim(config, sizes),
            "tied": bool(getattr(config, "tie_word_embeddings", False)),
            **_sliding(config, sizes),
        }
        if family is None:
            latent = getattr(config, "kv_lora_rank", None)
            known["latent_size"] = latent + _rotated(config) if latent else 0
            return _counted(config, ModelShape(**known, **_generic_experts(config, sizes)))
        from_config = bool(getattr(config, "attention_bias", False))
        return ModelShape(
            **known,
            qk_norm=family.qk_norm,
            qkv_bias=from_config if family.qkv_bias is None else family.qkv_bias,
            output_bias=from_config and family.qkv_bias is None,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            **(_expert_sizes(config) if config.model_type == "qwen3_moe" else {}),
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all key heads together; that of the values as well."""
        return self.num_kv_heads * self.head_dim

    def cached_entries(self, num_tokens: int) -> int:
        """Entries of the cache of one completion of `num_tokens`, its prompt included."""
        sliding = self.num_sliding_layers * min(num_tokens, max(self.sliding_window - 1, 0))
        full = (self.num_layers - self.num_sliding_layers) * num_tokens
        return (full + sliding) * (self.latent_size or 2 * self.key_size)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return 0 if self.tied else self.embedding_parameters

    @property
    def attention_weights(self) -> int:
        """Entries of the four projections of one layer, without biases."""
        return 2 * self.hidden_size * (self.query_size + self.key_size)

    @property
    def linear_weights(self) -> int:
        """Entries of every linear layer of the body that exists."""
        experts = self.num_experts * (3 * self.expert_size + 1)
        return self._sum_over_layers(experts)

    @property
    def active_weights(self) -> int:
        """Entries of the linear layers that one token passes: each costs 2 FLOP a token forward."""
        experts = self.experts_per_token * 3 * self.expert_size + self.num_experts
        return self._sum_over_layers(experts) + self.other_active_weights

    @property
    def body_parameters(self) -> int:
        """Everything between embedding and head: linear layers, biases and norms."""
        biases = self.qkv_bias * (self.query_size + 2 * self.key_size)
        biases += self.output_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        layers = self.linear_weights + self.num_layers * (biases + norms)
        return layers + self.hidden_size + self.other_parameters

    @property
    def num_parameters(self) -> int:
        return self.embedding_parameters + self.body_parameters + self.head_parameters

    def adapter_parameters(self, rank: int, targets: str | Collection[str] | None = None) -> int:
        """LoRA matrices of this rank; none in experts.

        Args:
            targets: PEFT's `target_modules`: names, a regular expression over whole names, "all-linear", or
                None for PEFT's own choice, which is the query and value projections.
        """
        hidden, wide = self.hidden_size, self.intermediate_size
        sizes = {
            "self_attn.q_proj": hidden + self.query_size,
            "self_attn.k_proj": hidden + self.key_size,
            "self_attn.v_proj": hidden + self.key_size,
            "self_attn.o_proj": hidden + self.query_size,
            "mlp.gate_proj": hidden + wide,
            "mlp.up_proj": hidden + wide,
            "mlp.down_proj": hidden + wide,
        }
        dense = self.num_layers - self.num_moe_layers
        return rank * sum(
            size
            for name, size in sizes.items()
            for layer in range(dense if name.startswith("mlp.") else self.num_layers)
            if _is_target(f"model.layers.{layer}.{name}", targets)
        )

    def _sum_over_layers(self, expert_rows: int) -> int:
        dense = self.num_layers - self.num_moe_layers
        feed_forward = dense * 3 * self.intermediate_size + self.num_moe_layers * expert_rows
        return self.num_layers * self.attention_weights + feed_forward * self.hidden_size


def _is_target(name: str, targets: str | Collection[str] | None) -> bool:
    """Whether PEFT puts an adapter on this linear layer; the name is that in a model with a head."""
    if targets is None:
        targets = ("q_proj", "v_proj")
    if isinstance(targets, str):
        # PEFT has read the word before a regular expression, which is matched with the whole name.
        return targets == "all-linear" or bool(re.fullmatch(targets, name))
    return any(name.endswith(f".{target}") for target in targets)


def _read(config: Any, field: str, name: str) -> int:
    """A size by any of its names."""
    for alias in FIELDS[field]:
        value = getattr(config, alias, None)
        # Hybrid models give a list with one entry a layer.
        value = max(value) if isinstance(value, list | tuple) and value else value
        if isinstance(value, int):
            return value
    if field == "intermediate_size" and hasattr(config, "n_inner"):
        return 4 * _read(config, "hidden_size", name)  # GPT-2's meaning of None
    raise ConfigError(
        f"plan: the config of {name or 'this model'} ({config.model_type}) does not say {field} (looked for "
        f"{', '.join(FIELDS[field])})"
    )


def _head_dim(config: Any, sizes: dict[str, int]) -> int:
    if getattr(config, "kv_lora_rank", None):  # MLA: the mean of what a query and what a value has.
        query = getattr(config, "qk_nope_head_dim", 0) + _rotated(config)
        return (query + getattr(config, "v_head_dim", query)) // 2
    return getattr(config, "head_dim", None) or sizes["hidden_size"] // sizes["num_heads"]


def _rotated(config: Any) -> int:
    return getattr(config, "qk_rope_head_dim", None) or 0


def _kv_heads(config: Any, sizes: dict[str, int]) -> int:
    # Falcon before its new architecture says one head for all queries by this alone.
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        return 1
    return getattr(config, "num_key_value_heads", None) or sizes["num_heads"]


def _sliding(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Layers whose cache slides, as transformers makes it, and their window."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return {}
    kinds = getattr(config, "layer_types", None)
    number = sizes["num_layers"] if kinds is None else list(kinds).count("sliding_attention")
    return {"num_sliding_layers": number, "sliding_window": window}


def _generic_experts(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Experts in every layer, where a config names their number."""
    found = [
        getattr(config, name, None)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
    ]
    number = next((value for value in found if isinstance(value, int) and value > 1), None)
    if number is None:
        return {}
    active = [getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts")]
    return {
        "num_moe_layers": sizes["num_layers"],
        "num_experts": number,
        "experts_per_token": next((value for value in active if isinstance(value, int)), 1),
        "expert_size": getattr(config, "moe_intermediate_size", None) or sizes["intermediate_size"],
    }


def _counted(config: Any, shape: ModelShape) -> ModelShape:
    """The shape with the counts of the real class, built without memory; as it is where none can be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, AttributeError, NotImplementedError):
        return shape
    number = sum(parameter.numel() for parameter in model.parameters())
    looked_up = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    left_out = {
        id(module.weight) for module in [*looked_up, model.get_output_embeddings()] if module
    }
    active = 0
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and id(weight) not in left_out and not name.endswith("bias"):
            expert = weight.ndim == 3 and weight.shape[0] == shape.num_experts
            rows = shape.experts_per_token if expert else weight.shape[0]
            active += rows * weight[0].numel()
    return replace(
        shape,
        other_parameters=number - shape.num_parameters,
        other_active_weights=active - shape.active_weights,
    )


def _expert_sizes(config: Any) -> dict[str, Any]:
    routed = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    ]
    return {
        "num_moe_layers": len(routed),
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_size": config.moe_intermediate_size,
    }
