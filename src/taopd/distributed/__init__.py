"""Sums and order statistics over ranks, and full tensors of sharded parameters."""
