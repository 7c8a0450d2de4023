"""A micro teacher, student and prompts on disk: real formats, milliseconds to load."""

from pathlib import Path

import pandas as pd

from tests.conftest import make_model, make_tokenizer


def write_lab(folder: Path, *, num_prompts: int = 40) -> None:
    """Write `student`, `teacher` and `prompts.parquet` below a folder."""
    for name, seed, width in (("student", 0, 16), ("teacher", 1, 32)):
        make_model(seed=seed, hidden_size=width).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
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
