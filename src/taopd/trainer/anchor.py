"""The KL penalty to the reference model, and the measurement that the collapse guard reads.

Both need the student as it was before training (the reference model) at some unselected tokens of the batch:
`Choice.reference_mask` says at which, and one forward on the completions that hold them serves both.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from taopd.kernels import Head, topk_score
from taopd.losses import resolve_loss
from taopd.models.batch import Forward
from taopd.signals import TokenSignals, at_ids, idle_drift, ids_to_compare
from taopd.trainer.collapse_guard import CollapseGuard
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import LossInputs, Term
from taopd.trainer.reference_student import ReferenceStudent
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.step_metrics import Recorder


class Anchor:
    """KL penalty and guard measurement of one trainer; does nothing where both are off.

    Args:
        head_of: the head of a prepared model, cut to the shared ids.
        guard: None: collapse_guard is off.
        reference: of the student before training, where somebody else needs it too; None: made if needed.
    """

    def __init__(
        self,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        accelerator: Accelerator,
        recorder: Recorder,
        head_of: Callable[[Any], Head],
        guard: CollapseGuard | None,
        reference: ReferenceStudent | None = None,
    ) -> None:
        self._args, self._recorder, self._head_of, self._guard = args, recorder, head_of, guard
        self._function = resolve_loss(args.anchor_loss)
        self._coefficient = args.anchor_coef or 0.0
        needed = self._coefficient > 0.0 or guard is not None
        if needed and reference is None:
            reference = ReferenceStudent(student, accelerator)
        self._reference = reference if needed else None

    def measure(self, forward: Forward, student: Any, scored: ScoredBatch) -> dict[str, Any]:
        """Run the reference model where it is needed; the states of it that the penalty will read."""
        choice, positions = scored.choice, scored.positions
        if self._reference is None or not scored.table.ranks.any(choice.reference_mask):
            return {}
        # The choice is on the CPU, where all processes made it; the states are on the device.
        tokens = choice.reference_mask[scored.local].to(positions.row.device)
        size = self._args.per_device_train_batch_size
        with self._recorder.timed("perf/anchor_s"):
            mask = positions.spread(tokens.float()) != 0
            hidden = self._reference.states(forward, student, scored.batch, mask, size)
        if self._guard is not None and scored.step % self._args.guard_every == 0:
            with self._recorder.timed("perf/guard_s"):
                head = self._reference.head(self._head_of, student)
                drift = self._drift(torch.cat(hidden), head, scored.signals, tokens)
                self._guard.measure(scored.step, scored.table, choice, drift)
        return {"reference_hidden": hidden} if self._coefficient > 0.0 else {}

    def term(self, student: Any, inputs: LossInputs) -> Term | None:
        """The penalty of a micro-batch, None where the anchor is off.

        Args:
            student: unwrapped.
        """
        if self._reference is None or inputs.reference_hidden is None:
            return None
        return Term(
            name="anchor",
            weights=inputs.anchor_weights,
            hidden=inputs.reference_hidden,
            head=self._reference.head(self._head_of, student),
            function=self._function,
        )

    def _drift(
        self, hidden: Tensor, head: Head, signals: TokenSignals, tokens: Bool[Tensor, " N"]
    ) -> Float[Tensor, " n"]:
        """`idle_drift` from the reference model at some tokens, nats."""
        students, teachers = signals.student_topk_ids[tokens], signals.teacher_topk_ids[tokens]
        listed = signals.student_topk_logprobs[tokens]
        at_teachers_ids = signals.student_at_teacher_ids
        ids = ids_to_compare(students, teachers)
        scores = topk_score(
            hidden, head, ids[:, 0], k=1, temperature=self._args.temperature, want_ids=ids
        )
        # One scan of the head for both lists: the scan costs as much as a forward of a small model.
        assert scores.want_logprobs is not None
        at_students, at_teachers = scores.want_logprobs.split(
            [students.shape[1], teachers.shape[1]], dim=1
        )
        return idle_drift(
            listed,
            at_students,
            signals.teacher_topk_logprobs[tokens],
            # A teacher behind a server may have sent its list alone.
            at_ids(students, listed, teachers)
            if at_teachers_ids is None
            else at_teachers_ids[tokens],
            at_teachers,
        )
