"""Tensor kernels: heads and what is computed from hidden states block by block."""

from taopd.kernels.head import CHUNK_ELEMENTS, Head, positions_per_chunk

__all__ = ["CHUNK_ELEMENTS", "Head", "positions_per_chunk"]
