"""A micro teacher, student and prompts on disk: real formats, milliseconds to load."""

from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", "+", "=", *(f"w{i}" for i in range(24)))


def write_lab(folder: Path, *, num_prompts: int = 40) -> None:
    """Write `student`, `teacher` and `prompts.parquet` below a folder."""
    for name, seed, width in (("student", 0, 16), ("teacher", 1, 32)):
        _model(seed, width).save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)
    rows = [
        {
            "prompt": f"{'w1 ' * (i % 3)}{i % 7} + {i % 5} =",
            "answer": str(i % 7 + i % 5),
            "split": split,
        }
        for split in ("train", "test")
        for i in range(num_prompts)
    ]
    pd.DataFrame(rows).to_parquet(folder / "prompts.parquet")


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {name: f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    tokens = {f"{name}_token": text for name, text in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **tokens)


def _model(seed: int, width: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
