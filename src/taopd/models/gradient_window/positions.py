"""Which positions carry gradient, and how they lie among the keys they look at.

All of it is index arithmetic on the host, once per micro-batch: every layer of the forward and of the
backward reads the same `Layout`. The active positions of all sequences are packed into one row without
padding, so that everything but attention runs on exactly the positions that carry gradient; attention goes
sequence by sequence and in blocks of queries, each over the keys that its last query may see.

Why not one padded [b, M] batch with a dense [b, 1, M, L] mask: the sequence with most active positions sets
the cost of all, half of the scores are computed to be masked, and a mask makes sdpa repeat grouped keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# On a CPU a block's scores should stay in the cache.
BLOCK_ELEMENTS = {"cpu": 2**19}
"""Attention scores of one block of queries, entries over all heads, by device type."""
DEFAULT_BLOCK_ELEMENTS = 2**26
"""... on an accelerator, where the launch of a kernel costs more than the scores it skips."""
MIN_BLOCK = 16


def gradient_positions(
    wanted: Bool[Tensor, "b L"], valid: Bool[Tensor, "b L"], window: int
) -> Bool[Tensor, "b L"]:
    """The wanted positions and the `window` valid ones before each.

    Args:
        wanted: positions whose hidden state is read, those that predict a selected token.
        valid: false at padding.

    Aligned example, window 1:

        valid    F T T T T T
        wanted   F F F T F F
        result   F F T T F F
    """
    # Prefix sums: whether a wanted position is within the window is one subtraction, whatever the window.
    count = torch.nn.functional.pad(wanted.long().cumsum(1), (1, 0))
    columns = torch.arange(wanted.shape[1], device=wanted.device)
    after = (columns + window + 1).clamp(max=wanted.shape[1])
    near = count[:, after] > count[:, columns]
    return wanted | (near & valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive queries of one sequence and the keys that they see between them."""

    queries: slice
    """In the packed row."""
    keys: slice
    """In the sequence's keys."""
    fresh: slice
    """The fresh keys among them, in the packed row."""
    fresh_keys: Int[Tensor, " f"]
    """Where these stand in `keys`."""
    unseen: Bool[Tensor, "q k"]
    """Keys that a query must not see: later than it, or before its sliding window."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One sequence of the batch that has active positions.

    Aligned example, one column of padding, two active positions, nothing after the last:

        column   0 1 2 3 4
        valid    F T T T T
        active   F F T F T
        keys       1 2 3 4      columns
        places       1   3      of the active positions among the keys
    """

    row: int
    start: int
    """First entry in the packed row."""
    columns: Int[Tensor, " m"]
    keys: Int[Tensor, " n"]
    places: Int[Tensor, " m"]
    device: torch.device
    _moved: dict[str, Tensor] = field(default_factory=dict)
    _blocks: dict[tuple[int | None, int], list[Block]] = field(default_factory=dict)

    @property
    def packed(self) -> slice:
        return slice(self.start, self.start + len(self.columns))

    def gather(self, constant: Tensor, fresh: Tensor) -> Tensor:
        """Keys (or values) [heads, n, d] of one layer: the constants, and the fresh ones in their places.

        Args:
            constant: the layer's prefix [b, heads, L, d].
            fresh: the packed row's [heads, M, d].
        """
        # Without padding inside the row a slice will do, which is cheaper than an index.
        first, last = int(self.keys[0]), int(self.keys[-1]) + 1
        if last - first == len(self.keys):
            full = constant[self.row, :, first:last].to(fresh.dtype, copy=True)
        else:
            full = constant[self.row].index_select(1, self._on_device("keys")).to(fresh.dtype)
        return full.index_copy_(1, self._on_device("places"), fresh[:, self.packed])

    def _on_device(self, name: str) -> Tensor:
        # Index tensors are made on the host and moved once, not once a layer.
        if name not in self._moved:
            self._moved[name] = getattr(self, name).to(self.device)
        return self._moved[name]

    def blocks(self, sliding_window: int | None, size: int) -> list[Block]:
        """Blocks of `size` queries; the result is kept, because all layers of a kind share it."""
        name = sliding_window, size
        if name not in self._blocks:
            self._blocks[name] = list(self._make_blocks(sliding_window, size))
        return self._blocks[name]

    def _make_blocks(self, sliding_window: int | None, size: int) -> Iterator[Block]:
        for first in range(0, len(self.columns), size):
            queries = self.columns[first : first + size]
            last = first + len(queries)
            end, begin, oldest = int(self.places[last - 1]) + 1, 0, 0
            if sliding_window is not None:
                # Keys that no query of the block can see any more are left out of the matmul.
                begin = int(torch.searchsorted(self.keys, queries[0] - sliding_window, right=True))
                oldest = int(torch.searchsorted(self.places, begin))
            columns = self.keys[begin:end]
            unseen = columns > queries[:, None]
            if sliding_window is not None:
                unseen |= columns <= queries[:, None] - sliding_window
            yield Block(
                queries=slice(self.start + first, self.start + last),
                keys=slice(begin, end),
                fresh=slice(self.start + oldest, self.start + last),
                fresh_keys=(self.places[oldest:last] - begin).to(self.device),
                unseen=unseen.to(self.device),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The active positions of a micro-batch, packed in the order (row, column)."""

    sequences: list[Sequence]
    row: Int[Tensor, " M"]
    column: Int[Tensor, " M"]
    num_valid: int
    """Valid positions of the micro-batch, up to the last column kept."""

    @staticmethod
    def of(active: Bool[Tensor, "b L"], valid: Bool[Tensor, "b L"]) -> "Layout":
        """Layout of the active positions; keys are the valid positions up to a row's last active one."""
        row, column = active.nonzero(as_tuple=True)
        # One transfer: the loop below would otherwise wait for the device at every row.
        active_host, seen_host = active.cpu(), (valid | active).cpu()
        sequences, start = [], 0
        for index in range(len(active)):
            columns = active_host[index].nonzero().squeeze(1)
            if not len(columns):
                continue
            keys = seen_host[index, : int(columns[-1]) + 1].nonzero().squeeze(1)
            sequences.append(
                Sequence(
                    row=index,
                    start=start,
                    columns=columns,
                    keys=keys,
                    places=torch.searchsorted(keys, columns),
                    device=active.device,
                )
            )
            start += len(columns)
        num_valid = int(seen_host.sum())
        return Layout(sequences=sequences, row=row, column=column, num_valid=num_valid)

    def blocks(
        self, sliding_window: int | None, num_heads: int
    ) -> Iterator[tuple[Sequence, list[Block]]]:
        """Every sequence with its blocks, sized so that a block's scores over all heads stay small."""
        for sequence in self.sequences:
            elements = BLOCK_ELEMENTS.get(sequence.device.type, DEFAULT_BLOCK_ELEMENTS)
            size = max(MIN_BLOCK, elements // (num_heads * len(sequence.keys)))
            yield sequence, sequence.blocks(sliding_window, size)
