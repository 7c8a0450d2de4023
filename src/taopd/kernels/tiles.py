"""How much is projected at a time: sizes that kernels and the plan of a run's memory share. No torch."""

from typing import NamedTuple

CHUNK_ELEMENTS = 2**24
"""Logits held at a time, entries of float32 (64 MiB a tensor); measured flat from 2**22 to 2**25 on a CPU."""
GROUP = 64
"""Columns that share one peak in the top-K search."""


class Tile(NamedTuple):
    """How much is projected at a time."""

    elements: int
    """Rows x columns of one tile of logits."""
    columns: int
    """Vocabulary ids of one tile; a multiple of `GROUP`."""


TILES = {"cpu": Tile(2**21, 2**14), "other": Tile(2**25, 2**14)}
"""cpu: the best or within 5 % of it of six sizes at V = 151,936 and widths 64 and 256, and balanced, on one
thread (benchmarks/bench_topk_score.py). Elsewhere: TRL's order of magnitude, not measured."""


def chunk_elements_on(device_type: str) -> int:
    """Entries of one chunk of logits: more on a GPU, where small products are slow."""
    return CHUNK_ELEMENTS if device_type == "cpu" else 4 * CHUNK_ELEMENTS


def positions_per_chunk(vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """How many positions to project at a time, so that one logits tensor has `chunk_elements` entries."""
    return max(1, chunk_elements // vocab_size)
