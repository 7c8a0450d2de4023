"""Between models and tensors: heads, padded batches as rows of positions, and the scoring pass.

Knows transformers models and padding; knows no trainer, selector or loss. How a model is run (inside
which wrapper) is the caller's `Forward`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import whole
from taopd.errors import NumericsError
from taopd.kernels import Head
from taopd.signals import TokenSignals, concatenate, exact_signals


def read_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """The model's output projection over the first `vocab_size` ids, as its forward would apply it.

    A sharded weight (FSDP2, ZeRO-3) is gathered here, once, and not per chunk. Scale and soft cap are read
    from the text config under the names that the model families use.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(head, "bias", None)
    return Head(
        weight=whole(head.weight)[:vocab_size],
        bias=None if bias is None else whole(bias)[:vocab_size],
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logit_scale(config) -> float:
    """Multiplier of the logits; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies by it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def head_dtype(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype that a head within the model's forward would compute in."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    return hidden.to(torch.get_autocast_dtype(device)) if enabled else hidden


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

    def describe(self, index: int, *, first_row: int = 0, when: str = "") -> str:
        """Where a position is, for an error message."""
        row = first_row + int(self.row[index])
        return f"{when}, completion {row} of the batch, position {int(self.column[index])}"

    def spread(self, values: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values back on the padded batch, zero elsewhere."""
        padded = values.new_zeros(self.shape)
        padded[self.row, self.column] = values
        return padded

    def by_row(self, values: Tensor, chosen: Bool[Tensor, " N"]) -> list[Tensor]:
        """The chosen entries of `values` [N, ...] as one tensor per row of the batch."""
        counts = torch.bincount(self.row[chosen], minlength=self.shape[0])
        return list(values[chosen].split(counts.tolist()))


def located(message: str) -> tuple[int, int] | None:
    """(completion, position) of a message that `Positions.describe` closed, None without one.

    Example:
        >>> located("the loss is NaN at step 3, completion 1 of the batch, position 17")
        (1, 17)
    """
    match = re.search(r"completion (\d+) of the batch, position (\d+)", message)
    return None if match is None else (int(match.group(1)), int(match.group(2)))


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
    if rows.numel() == 0:
        rows = rows.new_zeros(1)
    columns = active[rows].any(0).nonzero()
    length = int(columns.max()) + 1 if columns.numel() else 1
    first = first_used(prompt_mask[rows]) if first_column is None else first_column
    return Trimmed(
        input_ids=torch.cat([prompt_ids[rows, first:], completion_ids[rows, :length]], dim=1),
        attention_mask=torch.cat(
            [prompt_mask[rows, first:], completion_mask[rows, :length]], dim=1
        ),
        num_completion=length,
        rows=rows,
    )


Forward = Callable[[Any, Trimmed], tuple[Tensor, Head]]
"""(model, trimmed batch) -> states [b, num_completion, D] predicting each completion token, and the head."""


def micro_batches(positions: Positions, size: int) -> Iterator[tuple[slice, Bool[Tensor, "b T"]]]:
    """Row slices of a padded batch, and the mask of the given positions in them."""
    mask = positions.spread(torch.ones_like(positions.row, dtype=torch.bool))
    for start in range(0, len(mask), size):
        rows = slice(start, start + size)
        yield rows, mask[rows]


def states_at(
    forward: Forward,
    model,
    batch: Mapping[str, Tensor],
    positions: Positions,
    size: int,
    *,
    with_graph: bool = False,
    first_column: int | None = None,
) -> Iterator[tuple[Float[Tensor, "n D"], Head]]:
    """Per micro-batch of `size` rows: the states that predict the given positions, and the head.

    Args:
        with_graph: record the forward for a backward, whatever the caller's mode.
        first_column: see `trim`.
    """
    for rows, mask in micro_batches(positions, size):
        part = trim({name: batch[name][rows] for name in SEQUENCE}, mask, first_column)
        with torch.set_grad_enabled(with_graph):
            hidden, head = forward(model, part)
            hidden = hidden[mask[part.rows, : part.num_completion]]
        yield hidden, head


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What a scoring pass keeps of the student's forward for the loss."""

    keep_student_graph: bool = False
    """The forward is recorded and its states are kept: it is the training forward."""
    student_forward: Forward | None = None
    """The student's, where it is not the teacher's."""
    first_column: int | None = None
    """Where all micro-batches of the student begin; see `trim`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a scoring pass leaves for the selection and for the loss."""

    signals: TokenSignals
    teacher_hidden: Float[Tensor, "N Dt"] | None
    """The teacher's states at the scored positions, where the loss reads them."""
    student_hidden: Float[Tensor, "N D"] | None
    """The student's, with the graph of its forward, where this pass is the training forward."""


def score_positions(
    forward: Forward,
    student,
    teacher,
    batch: Mapping[str, Tensor],
    positions: Positions,
    *,
    micro_batch_size: int,
    k: int,
    temperature: float,
    keep_teacher_hidden: bool,
    when: str,
    full_kl: bool = False,
    stop_ids: Sequence[int] = (),
    reuse: Reuse | None = None,
) -> Scored:
    """Exact signals of the given positions of a padded batch; called without gradient.

    Args:
        full_kl: also both divergences over the full vocabulary.
        stop_ids: ids that count as one token, see `signals.merge_stop_class`; none by default.
        when: opens the message of an error about NaN or infinite logits.
        reuse: what the loss will take from the student's pass; default nothing.

    Raises:
        NumericsError: on NaN or infinite logits.
    """
    reuse = Reuse() if reuse is None else reuse
    signals, of_teacher, of_student = [], [], []
    sizes = batch, positions, micro_batch_size
    passes = zip(
        micro_batches(positions, micro_batch_size),
        states_at(
            reuse.student_forward or forward,
            student,
            *sizes,
            with_graph=reuse.keep_student_graph,
            first_column=reuse.first_column,
        ),
        states_at(forward, teacher, *sizes),
        strict=True,
    )
    problem = None
    for (rows, mask), (hidden, head), teacher_states in passes:
        describe = partial(Positions.of(mask).describe, first_row=rows.start, when=when)
        targets = batch["completion_ids"][rows][mask]
        try:
            found = exact_signals(
                hidden.detach(),
                head,
                *teacher_states,
                targets,
                k=k,
                temperature=temperature,
                full_kl=full_kl,
                stop_ids=stop_ids,
                locate=describe,
            )
        except NumericsError as error:
            # Other processes are in the same forwards: none may leave before the last one.
            problem = problem or error
            continue
        signals.append(found)
        if reuse.keep_student_graph:
            of_student.append(hidden)
        if keep_teacher_hidden:
            of_teacher.append(teacher_states[0])
    if problem is not None:
        raise problem
    with torch.set_grad_enabled(reuse.keep_student_graph):
        student_hidden = torch.cat(of_student) if of_student else None
    return Scored(
        signals=concatenate(signals),
        teacher_hidden=torch.cat(of_teacher) if of_teacher else None,
        student_hidden=student_hidden,
    )
