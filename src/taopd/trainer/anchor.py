"""The tokens that are not selected: held to the initial student by the anchor, watched by the guard.

Both need the initial student at some unselected tokens of the batch; `choose` says at which (`Choice.held`),
and one forward on the completions that hold them serves both.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import gathered, prepare_frozen
from taopd.kernels import Head, topk_score
from taopd.losses import resolve_loss
from taopd.models.batch import Forward, Positions
from taopd.models.forward import states_at
from taopd.signals import SignalTable, TokenSignals, at_ids, idle_drift, ids_to_compare
from taopd.trainer.collapse_guard import CollapseGuard
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import Term
from taopd.trainer.selection import Choice
from taopd.trainer.step_metrics import Recorder


class HeldTokens:
    """Anchor and guard of one trainer; does nothing where both are off.

    Args:
        head_of: the head of a prepared model, cut to the shared ids.
        guard: None: collapse_guard is off.
    """

    def __init__(
        self,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        accelerator: Accelerator,
        recorder: Recorder,
        head_of: Callable[[Any], Head],
        guard: CollapseGuard | None,
    ) -> None:
        self._args, self._recorder, self._head_of, self._guard = args, recorder, head_of, guard
        self._function = resolve_loss(args.anchor_loss)
        needed = args.coef > 0.0 or guard is not None
        self._reference = ReferenceStudent(student, accelerator) if needed else None

    def measure(
        self,
        forward: Forward,
        student: Any,
        batch: dict[str, Any],
        positions: Positions,
        table: SignalTable,
        choice: Choice,
        mine: slice,
        signals: TokenSignals,
        step: int,
    ) -> dict[str, Any]:
        """Run the initial student where it is needed; returns what the anchor's loss reads.

        Args:
            table: what was chosen from, `mine` this rank's rows of it.
            signals: of this rank's positions.
        """
        if self._reference is None or not table.ranks.any(choice.held):
            return {}
        held = choice.held[mine].to(positions.row.device)
        size = self._args.per_device_train_batch_size
        with self._recorder.timed("perf/anchor_s"):
            mask = positions.spread(held.float()) != 0
            hidden = self._reference.states(forward, student, batch, mask, size)
        if self._guard is not None and step % self._args.guard_every == 0:
            with self._recorder.timed("perf/guard_s"):
                head = self._head_of(self._reference.copy or student)
                drift = self._drift(torch.cat(hidden), head, signals, held)
                self._guard.measure(step, table, choice, drift)
        return {"reference_hidden": hidden} if self._args.coef > 0.0 else {}

    def _drift(self, hidden: Tensor, head: Head, signals: TokenSignals, held: Tensor) -> Tensor:
        students, teachers = signals.student_topk_ids[held], signals.teacher_topk_ids[held]
        listed = signals.student_topk_logprobs[held]
        there = signals.student_at_teacher_ids
        asked = ids_to_compare(students, teachers)
        scores = topk_score(
            hidden, head, asked[:, 0], k=1, temperature=self._args.temperature, want_ids=asked
        )
        assert scores.want_logprobs is not None
        at_students, at_teachers = scores.want_logprobs.split(
            [students.shape[1], teachers.shape[1]], dim=1
        )
        return idle_drift(
            listed,
            at_students,
            signals.teacher_topk_logprobs[held],
            at_ids(students, listed, teachers) if there is None else there[held],
            at_teachers,
        )

    def terms(self, student: Any, inputs: dict[str, Any]) -> list[Term]:
        """The anchor's term of a micro-batch's loss, or none."""
        if self._reference is None or "reference_hidden" not in inputs:
            return []
        head = self._head_of(self._reference.copy or student)
        return [Term("anchor", "reference", head, self._function)]


class ReferenceStudent:
    """A frozen copy of the student; with LoRA the base model with the adapter off, no second model.

    Args:
        student: as it is given to the trainer, before any step.
    """

    def __init__(self, student: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.copy: Any = None
        """The prepared copy, or None where the adapter is switched off instead."""
        if not is_peft_model(student):
            with gathered(student.parameters()):
                frozen = copy.deepcopy(student).requires_grad_(False)
            self.copy = prepare_frozen(accelerator, frozen)

    @torch.no_grad()
    def states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        anchored: Bool[Tensor, "B T"],
        micro_batch_size: int,
    ) -> list[Float[Tensor, "n D"]]:
        """The reference's hidden states at the anchored positions, one tensor per row of the batch."""
        positions = Positions.of(anchored)
        with self._weights(student) as reference:
            parts = list(states_at(forward, reference, batch, positions, micro_batch_size))
        hidden = torch.cat([states for states, _ in parts])
        return positions.by_row(hidden, torch.ones_like(positions.row, dtype=torch.bool))

    @contextmanager
    def _weights(self, student: Any) -> Iterator[Any]:
        if self.copy is not None:
            yield self.copy
            return
        with self._accelerator.unwrap_model(student).disable_adapter():
            yield student
