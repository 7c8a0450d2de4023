"""Tensor kernels: heads and what is computed from hidden states block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taopd.kernels.dispatch import IMPLS, pair_score, probabilities_at, topk_score
    from taopd.kernels.head import Head
    from taopd.kernels.reference import pair_from_logprobs
    from taopd.kernels.scores import PairScores, TopKScores, bhattacharyya, compare, disagreement
    from taopd.kernels.tiles import CHUNK_ELEMENTS, chunk_elements_on, positions_per_chunk

__all__ = [
    "CHUNK_ELEMENTS",
    "IMPLS",
    "Head",
    "PairScores",
    "TopKScores",
    "bhattacharyya",
    "chunk_elements_on",
    "compare",
    "disagreement",
    "pair_from_logprobs",
    "pair_score",
    "positions_per_chunk",
    "probabilities_at",
    "topk_score",
]

_HOME = {
    "dispatch": ("IMPLS", "pair_score", "probabilities_at", "topk_score"),
    "head": ("Head",),
    "reference": ("pair_from_logprobs",),
    "scores": ("PairScores", "TopKScores", "bhattacharyya", "compare", "disagreement"),
    "tiles": ("CHUNK_ELEMENTS", "chunk_elements_on", "positions_per_chunk"),
}


# Lazily: a plan reads the sizes of the chunks, and must not wait for torch.
def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"taopd.kernels.{module}"), name)
    raise AttributeError(f"module 'taopd.kernels' has no attribute {name!r}")
