"""Sizes of the radix search of `collectives`, which the plan of a run's traffic reads too. No torch."""

BITS = 8
"""Determined per round, by an all-reduce of 2^BITS counts."""
BYTES_PER_PLACE = (64 // BITS) * 2**BITS * 8
"""Sent by one order statistic: 8 rounds of 256 counts of 8 bytes, 16 KiB."""
