"""The shape of a model by its name: a folder with a config.json, a GGUF file, or a known public model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from taopd.errors import ConfigError
from taopd.trainer.cost.shapes import FIELDS, ModelShape

_DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Families of `FAMILIES` that a config.json says everything of."""


def _public(name: str, *sizes: int, tied: bool, vocab_size: int = 151_936) -> ModelShape:
    """A dense Qwen: width, feed-forward, layers, heads, key/value heads; heads of 128."""
    width, intermediate, layers, heads, kv_heads = sizes
    qwen3 = name.startswith("Qwen3")
    return ModelShape(
        name=name,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        tied=tied,
        qk_norm=qwen3,
        qkv_bias=not qwen3,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _public("Qwen3-0.6B", 1024, 3072, 28, 16, 8, tied=True),
        _public("Qwen3-1.7B", 2048, 6144, 28, 16, 8, tied=True),
        _public("Qwen3-4B", 2560, 9728, 36, 32, 8, tied=True),
        _public("Qwen3-8B", 4096, 12288, 36, 32, 8, tied=False),
        _public("Qwen3-14B", 5120, 17408, 40, 40, 8, tied=False),
        _public("Qwen2.5-3B", 2048, 11008, 36, 16, 2, tied=True),
        _public(
            "DeepSeek-R1-Distill-Qwen-14B",
            *(5120, 13824, 48, 40, 8),
            tied=False,
            vocab_size=152_064,
        ),
    )
}
"""Public models by the last part of their hub id; values of their config.json."""


def load_shape(name: str, *, elsewhere: bool = False) -> ModelShape:
    """The shape of a local folder with a config.json, of a GGUF file, or of a public model in `SHAPES`; no
    network.

    Args:
        elsewhere: its weights lie on another machine, in whatever format.
    """
    folder = Path(name)
    # False also for a name that no file can have.
    if name.lower().endswith(".gguf") or os.path.isdir(folder):
        if (plain := _plain_shape(name)) is not None:
            return plain
        from taopd.models.gguf import gguf_file
        from taopd.models.loading import load_config

        if os.path.isfile(folder / "config.json") or gguf_file(name):
            config = load_config(name)
            if not elsewhere:
                check_unpacked(config, name)
            return ModelShape.from_config(config, name=name)
    public = SHAPES.get(name.rpartition("/")[2])
    if public is None or os.path.isdir(folder):
        raise ConfigError(
            f"{name} is no folder with a config.json and no model of the built-in table: "
            f"{', '.join(SHAPES)}"
        )
    return public


def check_unpacked(config: Any, name: str = "") -> None:
    """Refuse the config of a model whose files hold quantized weights.

    Raises:
        ConfigError: how many bytes they take depends on the method, and a plan knows two.
    """
    packed = getattr(config, "quantization_config", None)
    if packed:
        known = packed if isinstance(packed, dict) else vars(packed)
        method = getattr(known.get("quant_method"), "value", known.get("quant_method"))
        raise ConfigError(
            f"the weights of {name or 'this model'} are quantized ({method}), and a plan does not know their "
            "bytes: plan with the model that it was made from, a teacher with teacher_quantization"
        )


def _plain_shape(name: str) -> ModelShape | None:
    """The shape of a known family whose config.json says all of it; transformers takes seconds to import."""
    try:
        found = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the usual path says what is wrong
    if not isinstance(found, dict) or found.get("model_type") not in _DENSE:
        return None
    if found.get("quantization_config"):
        return None
    sizes = [names[0] for names in FIELDS.values()] + ["num_key_value_heads"]
    # Of one family alone the class, and not the rule below, has the default.
    sizes += ["head_dim"] if "head_dim" in found or found["model_type"] == "qwen3" else []
    if not all(type(found.get(name)) is int and found[name] > 0 for name in sizes):
        return None
    if not isinstance(found.get("tie_word_embeddings"), bool) or "text_config" in found:
        return None
    # Which layers slide, the class works out.
    if found.get("use_sliding_window"):
        return None
    if found["model_type"] == "mistral":
        if "sliding_window" not in found:
            return None
    else:
        found["sliding_window"] = None
    config = SimpleNamespace(**found)
    config.get_text_config = lambda: config
    return ModelShape.from_config(config, name=name)
