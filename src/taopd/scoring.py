"""Between models and tensors: a model's head as a `Head`, and a padded batch as rows of positions.

Knows transformers models and padding; knows no trainer, selector or loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from taopd.kernels import Head


def read_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """The model's output projection over the first `vocab_size` ids, as its forward would apply it.

    A sharded (FSDP2) weight is gathered here, once, and not per chunk. Scale and soft cap are read from the
    text config under the names that the model families use.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    weight, bias = (_plain(value) for value in (head.weight, getattr(head, "bias", None)))
    return Head(
        weight=weight[:vocab_size],
        bias=None if bias is None else bias[:vocab_size],
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _plain(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _logit_scale(config) -> float:
    """Multiplier of the logits; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies by it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """The completion positions of a padded [B, T] batch, flattened in the order (row, column).

    Aligned example, completions of two and one tokens padded to three:

        mask   T T F    T F F
        row    0 0      1
        column 0 1      0
    """

    row: Int[Tensor, " N"]
    column: Int[Tensor, " N"]
    shape: tuple[int, int]

    @staticmethod
    def of(mask: Bool[Tensor, "B T"]) -> "Positions":
        """All positions where the mask is true."""
        row, column = mask.nonzero(as_tuple=True)
        return Positions(row=row, column=column, shape=(mask.shape[0], mask.shape[1]))

    def __len__(self) -> int:
        return self.row.shape[0]

    def describe(self, index: int, *, first_row: int = 0) -> str:
        """Where a position is, for an error message."""
        row = first_row + int(self.row[index])
        return f"completion {row} of the batch, position {int(self.column[index])}"

    def spread(self, values: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values back on the padded batch, zero elsewhere."""
        padded = values.new_zeros(self.shape)
        padded[self.row, self.column] = values
        return padded

    def by_row(self, values: Tensor, chosen: Bool[Tensor, " N"]) -> list[Tensor]:
        """The chosen entries of `values` [N, ...] as one tensor per row of the batch."""
        counts = torch.bincount(self.row[chosen], minlength=self.shape[0])
        return list(values[chosen].split(counts.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trimmed:
    """The part of a padded batch that a masked loss depends on; exact, because attention is causal."""

    input_ids: Int[Tensor, "b L"]
    attention_mask: Int[Tensor, "b L"]
    num_completion: int
    """Completion columns kept; the last one holds the last active position of any row."""
    rows: Int[Tensor, " b"]


def trim(
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Int[Tensor, "B P"],
    completion_ids: Int[Tensor, "B T"],
    completion_mask: Int[Tensor, "B T"],
    active: Bool[Tensor, "B T"],
) -> Trimmed:
    """Drop rows without an active position, columns after the last one, and prompt columns of padding.

    Where nothing is active one row and one column stay: every rank must still run a forward.
    """
    rows = active.any(1).nonzero().squeeze(1)
    if rows.numel() == 0:
        rows = rows.new_zeros(1)
    columns = active[rows].any(0).nonzero()
    length = int(columns.max()) + 1 if columns.numel() else 1
    used = prompt_mask[rows].any(0).nonzero()
    first = int(used.min()) if used.numel() else 0
    return Trimmed(
        input_ids=torch.cat([prompt_ids[rows, first:], completion_ids[rows, :length]], dim=1),
        attention_mask=torch.cat([prompt_mask[rows, first:], completion_mask[rows, :length]], dim=1),
        num_completion=length,
        rows=rows,
    )
