"""Several processes as one: sums and order statistics over ranks, and sharded parameters made whole."""
