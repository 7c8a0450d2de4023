"""A micro Llama, and models of its kind written as GGUF files with the package `gguf`.

A Llama, because transformers reads a head's width from the file for this family.
"""

from pathlib import Path

import numpy as np

from tests.conftest import WORDS

TOKENS = (*WORDS, "w", "x", "wx", "xw")
"""The last four are there for two merges, which a byte-level vocabulary needs: transformers 5.17 reads a list
of one as its one entry."""
WORDS_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of a layer's parts."""
WORDS_OF_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BLOCK = 32
"""Weights of a row that Q8_0 packs together."""


def make_llama(seed: int, *, scale: float = 1.0):
    """A randomly initialised Llama with a context of 64 tokens, its matrices times `scale`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        # A float32, which is what the file holds.
        rms_norm_eps=2.0**-20,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data *= scale if weight.ndim == 2 else 1.0
    return model.eval()


WORDS_OF_GEMMA = WORDS_OF_LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def make_gemma2(**options):
    """A randomly initialised Gemma 2 with a window of 4 tokens, and large enough numbers to meet its caps."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    ids = {"vocab_size": len(TOKENS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    few |= {"rms_norm_eps": 2.0**-20, "sliding_window": 4}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Gemma2ForCausalLM(Gemma2Config(**(sizes | ids | few | options)))
    for weight in model.parameters():
        weight.data *= 8.0 if weight.ndim == 2 else 1.0
    return model.eval()


def gguf_name(name: str, words=WORDS_OF_LAYER) -> str:
    """llama.cpp's name of a parameter."""
    bare = name.removesuffix(".weight")
    if bare in WORDS_OF_MODEL:
        return f"{WORDS_OF_MODEL[bare]}.weight"
    _, _, layer, rest = bare.split(".", 3)
    return f"blk.{layer}.{words[rest]}.weight"


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection as llama.cpp rotates them: pairs side by side, not in halves."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    model, path: Path, *, tokens=TOKENS, packed=False, extra=(), family="llama", ends=None, said=()
) -> dict[str, np.ndarray]:
    """Write a Llama or a Gemma 2 and its tokens; returns every tensor as it is unpacked, by its torch name.

    Args:
        packed: matrices in Q8_0; else everything in float32.
        extra: names of further tensors.
        family: llama.cpp's name of it; of another than these two only config and tokens can be read.
        ends: "eos", "eot" or other names of a token with a role, and which token; None: the eos alone.
        said: further numbers of the family, by llama.cpp's name: whole ones or floats.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name("micro")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in dict(said).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{family}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(tokens))
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["w x", "x w"])
    for end, token in ({"eos": "<eos>"} if ends is None else ends).items():
        writer.add_uint32(f"tokenizer.ggml.{end}_token_id", tokens.index(token))
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    kind, unpacked = gguf.GGMLQuantizationType.Q8_0, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    gemma = family == "gemma2"
    words = WORDS_OF_GEMMA if gemma else WORDS_OF_LAYER
    for name, weight in model.state_dict().items():
        if gemma and name == "lm_head.weight":  # the embedding
            continue
        # llama.cpp adds the 1 that Gemma's norms add.
        values = weight.float().numpy() + float(gemma and "norm" in name)
        packs = packed and values.ndim == 2 and values.shape[1] % BLOCK == 0
        unpacked[name] = values
        if packs:
            unpacked[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        number = next((n for part, n in heads.items() if part in name and not gemma), None)
        values = values if number is None else interleaved(values, number)
        if packs:
            writer.add_tensor(
                gguf_name(name, words), gguf.quants.quantize(values, kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(gguf_name(name, words), np.ascontiguousarray(values))
    for name in extra:
        writer.add_tensor(name, np.ones(config.head_dim // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked
