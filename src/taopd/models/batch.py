"""Padded batches of prompts and completions, and the flat positions of their completion tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from taopd.errors import DataError
from taopd.kernels import Head


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

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """True at the positions: the inverse of `of`."""
        return self.spread(torch.ones_like(self.row, dtype=torch.bool))

    def at(self, chosen: Bool[Tensor, " N"] | Int[Tensor, " n"]) -> "Positions":
        """The chosen positions of the same batch, by a mask or by their indices."""
        return Positions(row=self.row[chosen], column=self.column[chosen], shape=self.shape)

    def place(self, index: int, *, first_row: int = 0) -> tuple[int, int]:
        """(completion, position) of an entry; completions are counted from the batch's first row on."""
        return first_row + int(self.row[index]), int(self.column[index])

    def describe(self, index: int, *, first_row: int = 0, when: str = "") -> str:
        """Where an entry is, for an error message."""
        completion, position = self.place(index, first_row=first_row)
        return f"{when}, completion {completion} of the batch, position {position}"

    def spread(self, values: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values back on the padded batch, zero elsewhere."""
        # Zero means "does not train" in every column that is spread.
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

    @property
    def sequences(self) -> tuple[Tensor, Tensor, int]:
        """What a backbone is called with: input ids, attention mask, number of completion columns."""
        return self.input_ids, self.attention_mask, self.num_completion


SEQUENCE = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
"""Names of a padded batch's tensors: prompts [B, P] padded on the left, completions [B, T] on the right."""

TEACHER_PROMPT = ("teacher_prompt_ids", "teacher_prompt_mask")
"""Prompts that the teacher alone reads, [B, P'] padded on the left; absent where it reads the student's."""


def teacher_side(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A padded batch as the teacher reads it: its own prompts before the same completions."""
    if TEACHER_PROMPT[0] not in batch:
        return batch
    # A mapping of its own: the student goes on with the batch as it is.
    own = dict(zip(SEQUENCE[:2], (batch[name] for name in TEACHER_PROMPT), strict=True))
    return {**batch, **own}


def left_padded(
    rows: Sequence[list[int]], pad_id: int, device: Any = "cpu"
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Ids of prompts padded on the left, and their mask."""
    return _padded(rows, pad_id, device, side="left")


def teacher_columns(
    rows: Sequence[list[int]] | None, pad_id: int, device: Any = "cpu"
) -> dict[str, Tensor]:
    """The tensors of `TEACHER_PROMPT` for these prompts; none for None."""
    if rows is None:
        return {}
    return dict(zip(TEACHER_PROMPT, left_padded(rows, pad_id, device), strict=True))


def unpadded(batch: Mapping[str, Any], name: str, row: int) -> list[int]:
    """Ids of a row without its padding; `name`: prompt, completion or teacher_prompt."""
    return batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()


def first_used(prompt_mask: Int[Tensor, "B P"]) -> int:
    """The first prompt column that is not padding in every row."""
    used = prompt_mask.any(0).nonzero()
    return int(used.min()) if used.numel() else 0


def trim(
    batch: Mapping[str, Tensor], active: Bool[Tensor, "B T"], first_column: int | None = None
) -> Trimmed:
    """Drop rows without an active position, columns after the last one, and prompt columns of padding.

    Where nothing is active one row and one column stay: every rank must still run a forward.

    Args:
        first_column: of the prompts to keep; default the first one that is used in a kept row.
    """
    prompt_ids, prompt_mask, completion_ids, completion_mask = (batch[name] for name in SEQUENCE)
    rows = active.any(1).nonzero().squeeze(1)
    # Every rank must run a forward, also one without a token.
    if rows.numel() == 0:
        rows = rows.new_zeros(1)
    columns = active[rows].any(0).nonzero()
    length = int(columns.max()) + 1 if columns.numel() else 1
    first = first_used(prompt_mask[rows]) if first_column is None else first_column
    mask = torch.cat([prompt_mask[rows, first:], completion_mask[rows, :length]], dim=1)
    ids = torch.cat([prompt_ids[rows, first:], completion_ids[rows, :length]], dim=1)
    return Trimmed(
        # Padding may have an id that one of the models lacks; what stands there is never read.
        input_ids=ids.masked_fill(mask == 0, 0),
        attention_mask=mask,
        num_completion=length,
        rows=rows,
    )


def positions_of(attention_mask: Int[Tensor, "b L"]) -> Int[Tensor, "b L"]:
    """Position of every column, counted from a row's first real token; 0 at the padding before it."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns - attention_mask.long().argmax(1, keepdim=True)).clamp_min(0)


Forward = Callable[[Any, Trimmed], tuple[Tensor, Head]]
"""(model, trimmed batch) -> states [b, num_completion, D] predicting each completion token, and the head."""


def micro_batches(
    positions: Positions, size: int, *, skip_empty: bool = False
) -> Iterator[tuple[slice, Bool[Tensor, "b T"]]]:
    """Row slices of a padded batch, and the mask of the given positions in them.

    Args:
        skip_empty: leave out slices without a position, but for the first where all are without one.
    """
    mask = positions.mask
    used = mask.any(1)
    for start in range(0, len(mask), size):
        rows = slice(start, start + size)
        if not skip_empty or bool(used[rows].any()) or (start == 0 and not bool(used.any())):
            yield rows, mask[rows]


def used_rows(batch: Mapping[str, Any], positions: Positions) -> dict[str, Any]:
    """The tensors of a padded batch in the rows that hold one of the positions."""
    rows = positions.row.unique()
    return {
        name: value[rows]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == positions.shape[0]
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Prompts and completions as ids, in a fixed order.

    Aligned example, two completions of the first prompt and one of the second:

        prompt_ids      [5, 6]  [5, 6]     [7]
        completion_ids  [8, 2]  [9, 9, 2]  [3, 2]
        prompts         0       0          1
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """Up to and including the end-of-sequence token, if there is one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Where they came from, enough to make them again; plain values, no paths."""
    teacher_prompt_ids: list[list[int]] | None = None
    """Prompts that the teacher reads before the same completions; None: the same prompts."""

    def __post_init__(self) -> None:
        # An empty batch has no width, and no forward could be run on it.
        if not self.completion_ids:
            raise DataError("no completions: a bank needs at least one")
        if len(self.prompt_ids) != len(self.completion_ids):
            raise DataError(
                f"{len(self.prompt_ids)} prompts for {len(self.completion_ids)} completions; each "
                "completion needs its prompt"
            )
        own = self.teacher_prompt_ids
        if own is not None and (len(own) != len(self.completion_ids) or not all(own)):
            raise DataError(
                f"{len(own)} teacher prompts for {len(self.completion_ids)} completions; each needs one, and "
                "none may be empty"
            )
        for index, (prompt, completion) in enumerate(
            zip(self.prompt_ids, self.completion_ids, strict=True)
        ):
            if not prompt or not completion:
                what = "completion" if prompt else "prompt"
                raise DataError(f"the {what} of rollout {index} has no tokens; drop the rollout")

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def prompts(self) -> list[int]:
        """Group of every completion: the same prompt is the same cluster, in order of appearance."""
        groups: dict[tuple[int, ...], int] = {}
        return [groups.setdefault(tuple(ids), len(groups)) for ids in self.prompt_ids]

    def batch(self, *, pad_id: int = 0, device: Any = "cpu") -> dict[str, Tensor]:
        """The padded tensors of `taopd.models.batch.SEQUENCE`: prompts padded left, completions right.

        With those of `TEACHER_PROMPT` where the teacher has prompts of its own.
        """
        prompts = left_padded(self.prompt_ids, pad_id, device)
        completions = _padded(self.completion_ids, pad_id, device, side="right")
        batch = dict(zip(SEQUENCE, (*prompts, *completions), strict=True))
        return batch | teacher_columns(self.teacher_prompt_ids, pad_id, device)

    @staticmethod
    def of_batch(batch: dict[str, Tensor], settings: dict[str, Any]) -> "Rollouts":
        """The inverse of `batch`."""

        def rows(name: str) -> list[list[int]]:
            return [unpadded(batch, name, row) for row in range(len(batch["prompt_ids"]))]

        return Rollouts(
            prompt_ids=rows("prompt"),
            completion_ids=rows("completion"),
            settings=settings,
            teacher_prompt_ids=rows("teacher_prompt") if TEACHER_PROMPT[0] in batch else None,
        )


def _padded(
    rows: Sequence[list[int]], pad_id: int, device: Any, *, side: str
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    # The mask comes from the lengths and not from the ids: the padding id may be a token of a text.
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)
