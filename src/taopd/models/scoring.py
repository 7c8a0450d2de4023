"""The scoring pass: student and teacher run once over a padded batch, and every token gets its signals.

How a model is run (inside which wrapper) is the caller's `Forward`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import DataError, NumericsError
from taopd.kernels import Head
from taopd.models.batch import Forward, Positions, micro_batches, teacher_side, used_rows
from taopd.models.forward import states_of
from taopd.signals import TokenSignals, concatenate, exact_signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What a scoring pass keeps of the student's forward for the loss."""

    keep_student_graph: bool = False
    """The forward is recorded and its states are kept: it is the training forward."""
    student_forward: Forward | None = None
    """The student's, where it is not the teacher's."""
    first_column: int | None = None
    """Where all micro-batches of the student begin; see `trim`."""

    def student_states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        rows: slice,
        mask: Bool[Tensor, "b T"],
    ) -> tuple[Float[Tensor, "n D"], Head]:
        """`states_of` the student for a micro-batch, kept as the loss will take it.

        Args:
            forward: the teacher's, and the student's where it has none of its own.
        """
        return states_of(
            self.student_forward or forward,
            student,
            batch,
            rows,
            mask,
            with_graph=self.keep_student_graph,
            first_column=self.first_column,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Given(Reuse):
    """A pass that has run already, over all positions of a batch: nobody runs it again."""

    states: Float[Tensor, "N D"]
    head: Head
    place: Int[Tensor, "B T"]
    """Which of the N states predicts a token."""

    def student_states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        rows: slice,
        mask: Bool[Tensor, "b T"],
    ) -> tuple[Float[Tensor, "n D"], Head]:
        """The states at the mask."""
        return self.states[self.place[rows][mask]], self.head

    def at(self, positions: Positions) -> tuple[Float[Tensor, "n D"], Head]:
        """The states that predict tokens of the same batch, and the head that reads them."""
        return self.states[self.place[positions.row, positions.column]], self.head

    @staticmethod
    def of(
        reuse: Reuse,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        *,
        micro_batch_size: int,
    ) -> "Given":
        """Run the pass now; its states carry a graph where `reuse` records it."""
        states = []
        for rows, mask in micro_batches(positions, micro_batch_size):
            hidden, head = reuse.student_states(forward, student, batch, rows, mask)
            states.append(hidden)
        numbers = torch.arange(len(positions), device=positions.row.device)
        with torch.set_grad_enabled(reuse.keep_student_graph):
            joined = torch.cat(states)
        return Given(states=joined, head=head, place=positions.spread(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a scoring pass leaves for the selection and for the loss."""

    signals: TokenSignals
    teacher_hidden: Float[Tensor, "N Dt"] | None
    """The teacher's states at the scored positions, where the loss reads them."""
    student_hidden: Float[Tensor, "N D"] | None
    """The student's, with the graph of its forward, where this pass is the training forward."""
    parts: tuple[tuple[Int[Tensor, " n"], Float[Tensor, "n _"]], ...] = ()
    """Several teachers: in place of `teacher_hidden` the positions and states of each, as wide as it is."""

    def by_teacher(self) -> list[tuple[Tensor | slice, Tensor]]:
        """Positions and kept states of every teacher; of one all positions, as a slice: nothing is copied."""
        if self.teacher_hidden is None:
            return list(self.parts)
        return [(slice(None), self.teacher_hidden)]

    def teacher_by_row(
        self, positions: Positions, chosen: Bool[Tensor, " N"]
    ) -> list[Tensor] | None:
        """The teacher's states at the chosen positions, one tensor per row; None: none were kept."""
        if self.teacher_hidden is not None:
            return positions.by_row(self.teacher_hidden, chosen)
        if not self.parts:
            return None
        found: list[Tensor] = [self.parts[0][1][:0]] * positions.shape[0]
        for index, hidden in self.parts:
            # A row has one teacher: its positions are those of one part.
            own = positions.at(index)
            by_row = own.by_row(hidden, chosen[index])
            for row in own.row.unique().tolist():
                found[row] = by_row[row]
        return found


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
    skip_empty: bool = False,
) -> Scored:
    """Exact signals of the given positions of a padded batch; called without gradient.

    Args:
        batch: see `batch.SEQUENCE`; the teacher reads `batch.TEACHER_PROMPT`, where they are there.
        full_kl: also both divergences over the full vocabulary.
        stop_ids: ids that count as one token, see `signals.merge_stop_class`; none by default.
        when: opens the message of an error about NaN or infinite logits.
        reuse: what the loss will take from the student's pass; default nothing.
        skip_empty: run no forward of rows without a position, which other processes may wait for.

    Raises:
        NumericsError: on NaN or infinite logits. DataError: a prompt that the teacher cannot read.
    """
    side = teacher_side(batch)
    check_readable(used_rows(side, positions), teacher)
    reuse = Reuse() if reuse is None else reuse
    signals, of_teacher, of_student = [], [], []
    problem = None
    for rows, mask in micro_batches(positions, micro_batch_size, skip_empty=skip_empty):
        hidden, student_head = reuse.student_states(forward, student, batch, rows, mask)
        # The teacher has no prefix to keep: its columns may begin later than the student's.
        teacher_hidden, teacher_head = states_of(forward, teacher, side, rows, mask)
        local = Positions.of(mask)
        try:
            scored = exact_signals(
                # Signals carry no gradient, also where the pass is recorded.
                hidden.detach(),
                student_head,
                teacher_hidden,
                teacher_head,
                batch["completion_ids"][rows][mask],
                k=k,
                temperature=temperature,
                full_kl=full_kl,
                stop_ids=stop_ids,
                locate=partial(local.describe, first_row=rows.start, when=when),
            )
        except NumericsError as error:
            assert error.index is not None
            error.completion, error.position = local.place(error.index, first_row=rows.start)
            # Raised after the loop: other processes run the forwards of all micro-batches, and a process that
            # left earlier would leave them waiting in a collective.
            problem = problem or error
            continue
        signals.append(scored)
        if reuse.keep_student_graph:
            # Their graph lives until the loss's backward: this pass is the training forward.
            of_student.append(hidden)
        if keep_teacher_hidden:
            of_teacher.append(teacher_hidden)
    if problem is not None:
        raise problem
    with torch.set_grad_enabled(reuse.keep_student_graph):
        student_hidden = torch.cat(of_student) if of_student else None
    return Scored(
        signals=concatenate(signals),
        teacher_hidden=torch.cat(of_teacher) if of_teacher else None,
        student_hidden=student_hidden,
    )


def check_readable(batch: Mapping[str, Tensor], teacher: Any) -> None:
    """`check_prompt_ids` by the rows of the teacher's embedding; it may be wrapped for several processes."""
    # A wrapper may have a `config` of its own: DeepSpeed's is a dict of its settings.
    inner = getattr(teacher, "module", teacher)
    check_prompt_ids(batch, inner.config.get_text_config().vocab_size)


def check_prompt_ids(batch: Mapping[str, Tensor], known: int) -> None:
    """Refuse prompts with an id that the teacher has no token for.

    Behind its tokens its embedding may have further rows, which were never trained: they would be read
    without a word.

    Args:
        batch: as the teacher reads it.
        known: ids from this one on are no tokens of the teacher's.

    Raises:
        DataError: names the id and the largest that the teacher knows.
    """
    outside = (batch["prompt_ids"] >= known) & batch["prompt_mask"].bool()
    if bool(outside.any()):
        raise DataError(
            f"a prompt holds the token id {int(batch['prompt_ids'][outside][0])}, and the teacher knows ids "
            f"up to {known - 1} only: remove that token from chat template and prompts, give the teacher "
            "prompts of its own (teacher_prompt), or choose a teacher that has it"
        )
