"""Tensor kernels: heads and what is computed from hidden states block by block."""

from taopd.kernels.dispatch import IMPLS, pair_score, topk_score
from taopd.kernels.head import CHUNK_ELEMENTS, Head, chunk_elements_on, positions_per_chunk
from taopd.kernels.reference import pair_from_logprobs
from taopd.kernels.scores import PairScores, TopKScores, bhattacharyya, compare, disagreement

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
    "topk_score",
]
