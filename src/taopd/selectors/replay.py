"""Two ways to spend less on what is left over: a floor under the scores, and replay of agreements.

Why: a share of the batch always finds a best 5 %, however little is left to teach, and never supervises the
tokens on which the models agree; these are the first to drift.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from taopd.signals import SignalTable

COMPATIBLE = 0.9
"""C from which on a token counts as compatible."""
AGREED_NATS = 0.1
"""D up to which the models count as agreeing."""


def teachable(table: SignalTable, floor: float) -> Bool[Tensor, " N"]:
    """Where D C, as it is measured and not as it ranks in the batch, reaches `floor` nats."""
    return table.disagreement * table.compatibility >= floor


def agreements(table: SignalTable) -> Bool[Tensor, " N"]:
    """Where the models agree: C at least `COMPATIBLE` and D at most `AGREED_NATS`."""
    return (table.compatibility >= COMPATIBLE) & (table.disagreement <= AGREED_NATS)


def random_agreements(
    table: SignalTable, free: Bool[Tensor, " N"], count: int, generator: torch.Generator
) -> Bool[Tensor, " N"]:
    """`count` random agreements among the free rows of all ranks, or all of them if there are fewer."""
    rows = (free & agreements(table)).nonzero().squeeze(1)
    counts, rank = table.ranks.counts(rows.shape[0]), table.ranks.rank
    order = torch.randperm(sum(counts), generator=generator)[:count].to(rows.device)
    own = order - sum(counts[:rank])
    drawn = torch.zeros_like(free)
    drawn[rows[own[(own >= 0) & (own < rows.shape[0])]]] = True
    return drawn
