"""One table of signals from all ranks, so that 1 rank and 8 ranks choose the same positions."""

import torch
from accelerate import Accelerator

from taopd.signals import SignalTable


def gather_table(
    accelerator: Accelerator, local: SignalTable, *, num_rows: int
) -> tuple[SignalTable, slice]:
    """The table of all ranks on the CPU, in the order of one big batch, and this rank's rows of it.

    Plain tensors travel, 8 bytes per column and position, padded to the longest rank; nothing is pickled.

    Args:
        num_rows: completions on this rank, so that responses are numbered across ranks.
    """
    on_cpu = SignalTable(
        disagreement=local.disagreement.cpu(),
        compatibility=local.compatibility.cpu(),
        entropy=local.entropy.cpu(),
        response=local.response.cpu(),
        position=local.position.cpu(),
        valid=local.valid.cpu(),
        extra={name: column.cpu() for name, column in local.extra.items()},
    )
    if accelerator.num_processes == 1:
        return on_cpu, slice(0, len(local))
    device, rank = accelerator.device, accelerator.process_index
    counts = accelerator.gather(torch.tensor([[num_rows, len(local)]], device=device)).cpu()
    names = sorted(local.extra)
    columns = [
        on_cpu.disagreement,
        on_cpu.compatibility,
        on_cpu.entropy,
        on_cpu.response.double() + float(counts[:rank, 0].sum()),
        on_cpu.position.double(),
        on_cpu.valid.double(),
        *(on_cpu.extra[name] for name in names),
    ]
    stacked = torch.stack(columns, dim=1)
    padding = stacked.new_zeros((int(counts[:, 1].max()) - len(local), len(columns)))
    gathered = accelerator.gather(torch.cat([stacked, padding]).unsqueeze(0).to(device)).cpu()
    sizes = counts[:, 1].tolist()
    full = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    table = SignalTable(
        disagreement=full[:, 0],
        compatibility=full[:, 1],
        entropy=full[:, 2],
        response=full[:, 3].long(),
        position=full[:, 4].long(),
        valid=full[:, 5].bool(),
        extra={name: full[:, 6 + index] for index, name in enumerate(names)},
    )
    start = sum(sizes[:rank])
    return table, slice(start, start + len(local))
