"""S small Qwen3 models in one: weights have a leading axis, and matmuls are batched over it.

    weight of one model   [out, in]         a linear layer is   x W^T
    of the stack          [S, in, out]      ...                 bmm(x, W),  x [S, N, in]

What: the forward pass, and generation with a key/value cache, of models that differ only in their
weights. A model of the size of the tiny lab's spends most of a step outside of matrix products; forty
of them side by side share that cost.
Why not `torch.func.vmap` over the Hugging Face model: its masks, caches and hooks are the very
overhead. The arithmetic below is Qwen3's, in the same order; a test compares it with transformers.
Not here: padding inside a prompt (the lab's prompts have one length), dropout, biases.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from taopd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one model of the stack."""

    num_layers: int
    num_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float


Weights = dict[str, Tensor]
"""`embed` [S, V, D], `norm` [S, D], `head` [S, D, V]; for every layer i `i.norm1`, `i.qkv` [S, D, 3E],
`i.qnorm`, `i.knorm` [S, hd], `i.out` [S, E, D], `i.norm2`, `i.gate_up` [S, D, 2F], `i.down` [S, F, D]."""


@dataclass(slots=True)
class Cache:
    """Keys and values of the positions so far, per layer [S*B, H, length, hd]."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0


def stack(model: PreTrainedModel, count: int) -> tuple[Shape, Weights]:
    """Copy one model `count` times.

    Raises:
        ConfigError: for an architecture other than Qwen3 with as many key as query heads.
    """
    config = model.config
    if config.model_type != "qwen3" or config.num_key_value_heads != config.num_attention_heads:
        raise ConfigError(
            f"a stack holds Qwen3 models without grouped queries, not {config.model_type!r}"
        )
    shape = Shape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    one: Weights = {
        "embed": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
        "head": state["lm_head.weight"].T,
    }
    for i in range(shape.num_layers):
        part = f"model.layers.{i}."
        attention = [state[f"{part}self_attn.{name}_proj.weight"].T for name in "qkv"]
        mlp = [state[f"{part}mlp.{name}_proj.weight"].T for name in ("gate", "up")]
        one |= {
            f"{i}.norm1": state[f"{part}input_layernorm.weight"],
            f"{i}.qkv": torch.cat(attention, dim=1),
            f"{i}.qnorm": state[f"{part}self_attn.q_norm.weight"],
            f"{i}.knorm": state[f"{part}self_attn.k_norm.weight"],
            f"{i}.out": state[f"{part}self_attn.o_proj.weight"].T,
            f"{i}.norm2": state[f"{part}post_attention_layernorm.weight"],
            f"{i}.gate_up": torch.cat(mlp, dim=1),
            f"{i}.down": state[f"{part}mlp.down_proj.weight"].T,
        }
    return shape, {name: value.expand(count, *value.shape).clone() for name, value in one.items()}


def hidden_states(
    shape: Shape, weights: Weights, ids: Int[Tensor, "S B L"], cache: Cache | None = None
) -> Float[Tensor, "S B L D"]:
    """Last hidden states (after the final norm); with a cache, `ids` continue what it holds."""
    num_models, batch, length = ids.shape
    x = _embed(weights["embed"], ids.reshape(num_models, -1))
    start = 0 if cache is None else cache.length
    cosine, sine = _rotation(shape, start, length)
    for i in range(shape.num_layers):
        heads = num_models * batch, length, shape.num_heads, shape.head_dim
        normed = _norm(x, weights[f"{i}.norm1"], shape.norm_eps)
        q, k, v = (
            part.reshape(heads) for part in torch.bmm(normed, weights[f"{i}.qkv"]).chunk(3, dim=-1)
        )
        q = _rotate(_head_norm(q, weights[f"{i}.qnorm"], shape), cosine, sine).transpose(1, 2)
        k = _rotate(_head_norm(k, weights[f"{i}.knorm"], shape), cosine, sine).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = _extend(cache, i, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        mixed = mixed.transpose(1, 2).reshape(num_models, batch * length, -1)
        x = x + torch.bmm(mixed, weights[f"{i}.out"])
        normed = _norm(x, weights[f"{i}.norm2"], shape.norm_eps)
        gate, up = torch.bmm(normed, weights[f"{i}.gate_up"]).chunk(2, dim=-1)
        x = x + torch.bmm(F.silu(gate) * up, weights[f"{i}.down"])
    if cache is not None:
        cache.length += length
    return _norm(x, weights["norm"], shape.norm_eps).reshape(num_models, batch, length, -1)


def logits(weights: Weights, hidden: Float[Tensor, "S N D"]) -> Float[Tensor, "S N V"]:
    """The output projection."""
    return torch.bmm(hidden, weights["head"])


@torch.no_grad()
def generate(
    shape: Shape,
    weights: Weights,
    prompts: Int[Tensor, "S B P"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    uniforms: Float[Tensor, "S B T"] | None = None,
) -> Int[Tensor, "S B T"]:
    """Completions; after an end token only padding.

    Args:
        uniforms: in [0, 1), one per token: it is the quantile that is drawn from the cumulative
            distribution, so that two stacks given the same numbers sample alike. None: greedy.
    """
    num_models, batch, _ = prompts.shape
    cache = Cache(keys=[], values=[])
    done = torch.zeros(num_models, batch, dtype=torch.bool)
    tokens, ids = [], prompts
    for step in range(max_new_tokens):
        last = hidden_states(shape, weights, ids, cache)[:, :, -1]
        scores = logits(weights, last)
        if uniforms is None:
            drawn = scores.argmax(-1)
        else:
            cumulative = scores.softmax(-1).cumsum(-1)
            quantile = uniforms[:, :, step, None] * cumulative[..., -1:]
            drawn = torch.searchsorted(cumulative, quantile, right=True).squeeze(-1)
            drawn = drawn.clamp_max(scores.shape[-1] - 1)
        drawn = drawn.masked_fill(done, pad_id)
        tokens.append(drawn)
        done = done | (drawn == eos_id)
        ids = drawn.unsqueeze(-1)
        if bool(done.all()):
            break
    completions = torch.stack(tokens, dim=-1)
    return F.pad(completions, (0, max_new_tokens - completions.shape[-1]), value=pad_id)


def _embed(table: Float[Tensor, "S V D"], ids: Int[Tensor, "S N"]) -> Float[Tensor, "S N D"]:
    num_models, vocab_size, width = table.shape
    offset = torch.arange(num_models).unsqueeze(1) * vocab_size
    return F.embedding(ids + offset, table.reshape(-1, width))


def _norm(x: Float[Tensor, "S N D"], weight: Float[Tensor, "S D"], eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps) * weight.unsqueeze(1)


def _head_norm(x: Float[Tensor, "R L H hd"], weight: Float[Tensor, "S hd"], shape: Shape) -> Tensor:
    normed = F.rms_norm(x, (shape.head_dim,), eps=shape.norm_eps)
    num_models = weight.shape[0]
    grouped = normed.reshape(num_models, -1, shape.head_dim) * weight.unsqueeze(1)
    return grouped.reshape(x.shape)


def _rotation(shape: Shape, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, 1, hd] of the rotary embedding from position `start` on."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(start, start + length).float(), shape.rope_theta**-steps)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def _rotate(x: Float[Tensor, "R L H hd"], cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def _extend(cache: Cache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if layer == len(cache.keys):
        cache.keys.append(k)
        cache.values.append(v)
    else:
        cache.keys[layer] = torch.cat([cache.keys[layer], k], dim=2)
        cache.values[layer] = torch.cat([cache.values[layer], v], dim=2)
    return cache.keys[layer], cache.values[layer]
