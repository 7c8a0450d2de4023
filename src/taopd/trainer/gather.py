"""One table of signals over all ranks, so that 1 rank and 8 ranks choose the same positions.

Up to `limit` tokens every rank gets all rows, as bytes: 8 for completion, position and validity, 4 for a
column that float32 holds without loss (every rank says so with its counts), else 8. Above it no row leaves
its rank: the part stays where it is, with `Ranks` to ask the others for counts and order statistics.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks
from taopd.runs.signal_names import SELECTED_BY
from taopd.signals import SignalTable

PLACE_BYTES = 8
"""Response, position and validity of a row in one int64."""
_POSITION_BITS = 31


class Gathered(NamedTuple):
    """What a rank knows of the generation batch."""

    part: SignalTable
    """This rank's rows, with every column; responses numbered over all ranks."""
    table: SignalTable
    """What to choose from: the rows of all ranks in the order of one big batch, or `part` itself."""
    local: slice
    """Where this rank's rows are in `table`."""


def gather_table(
    accelerator: Accelerator,
    local: SignalTable,
    *,
    num_rows: int,
    limit: int,
    columns: Collection[str] | None = None,
) -> Gathered:
    """Bring the ranks' tables together, on the CPU.

    Args:
        num_rows: completions on this rank, so that responses are numbered across ranks.
        limit: tokens of all ranks up to which rows travel.
        columns: further signals that `table` needs; default all.
    """
    part = _to_cpu(local)
    if accelerator.num_processes == 1:
        return Gathered(part, part, slice(0, len(part)))
    names = sorted(part.extra if columns is None else set(part.extra) & set(columns))
    values = [getattr(part, name) for name in SELECTED_BY] + [part.extra[name] for name in names]
    exact = [int(torch.equal(value, value.float().double())) for value in values]
    facts = torch.tensor([[num_rows, len(part), *exact]], device=accelerator.device)
    # One small collective first, so that every process knows how long the next one is.
    facts = accelerator.gather(facts).cpu()
    rank, sizes = accelerator.process_index, facts[:, 1].tolist()
    ranks = ranks_of(accelerator)
    part = replace(part, completion=part.completion + facts[:rank, 0].sum(), ranks=ranks)
    if sum(sizes) > limit:
        return Gathered(part, part, slice(0, len(part)))
    dtypes = [torch.float32 if all(flags) else torch.float64 for flags in facts[:, 2:].T.tolist()]
    rows = _packed(part, [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)])
    # Collectives want equal lengths; the rows that fill up are cut off again by count.
    padding = rows.new_zeros(max(sizes) - len(part), rows.shape[1])
    gathered = accelerator.gather(torch.cat([rows, padding])[None].to(accelerator.device)).cpu()
    every = torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)])
    start = sum(sizes[:rank])
    return Gathered(part, _unpacked(every, names, dtypes), slice(start, start + len(part)))


def ranks_of(accelerator: Accelerator) -> Ranks:
    """The processes of a run."""

    def all_reduce(values: Tensor) -> Tensor:
        return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()

    if accelerator.num_processes == 1:
        return ALONE
    return Ranks(
        rank=accelerator.process_index, size=accelerator.num_processes, all_reduce=all_reduce
    )


def is_not_repeated(accelerator: Accelerator, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1"]:
    """False in the rows with which accelerate fills up the last batch of an evaluation.

    They make ranks even, repeat the first prompts, and come after all others in the order of the ranks.
    """
    state, num_rows = accelerator.gradient_state, mask.shape[0]
    rows = torch.arange(num_rows, device=mask.device) + accelerator.process_index * num_rows
    uneven = accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
    return (rows < state.remainder if uneven else rows >= 0)[:, None]


def _to_cpu(table: SignalTable) -> SignalTable:
    moved = {
        name: getattr(table, name).cpu()
        for name in (*SELECTED_BY, "completion", "position", "valid")
    }
    return replace(table, **moved, extra={name: value.cpu() for name, value in table.extra.items()})


def _packed(part: SignalTable, values: list[Tensor]) -> Tensor:
    """uint8 [rows, bytes]."""
    place = part.completion.long() << (_POSITION_BITS + 1)
    place |= (part.position.long() << 1) | part.valid.long()
    return torch.cat(
        [column[:, None].contiguous().view(torch.uint8) for column in (place, *values)], 1
    )


def _unpacked(rows: Tensor, names: list[str], dtypes: list[torch.dtype]) -> SignalTable:
    sizes = [PLACE_BYTES, *(dtype.itemsize for dtype in dtypes)]
    pieces = [piece.contiguous() for piece in rows.split(sizes, dim=1)]
    place = pieces[0].view(torch.int64)[:, 0]
    values = [
        piece.view(dtype)[:, 0].double() for piece, dtype in zip(pieces[1:], dtypes, strict=True)
    ]
    return SignalTable(
        **dict(zip(SELECTED_BY, values, strict=False)),
        completion=place >> (_POSITION_BITS + 1),
        position=(place >> 1) & (2**_POSITION_BITS - 1),
        valid=(place & 1).bool(),
        extra=dict(zip(names, values[3:], strict=True)),
    )
