"""The KL penalty to the reference model, the collapse guard's measurement, and what selection reads of it.

All need the student as it was before training (the reference model). Penalty and guard read it at some
unselected tokens (`Choice.reference_mask`), reach and its own D and C at every token, before the selection.
One forward on the completions that hold these tokens serves all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from taopd.kernels import Head, topk_score
from taopd.losses import needs_teacher_distribution, resolve_loss
from taopd.models.batch import Forward, Positions
from taopd.models.scoring import Scored
from taopd.models.stop_tokens import merged_ids
from taopd.signals import (
    INITIAL,
    INITIAL_GIVES,
    OF_THE_START,
    TokenSignals,
    at_ids,
    exact_signals,
    foreign_bound,
    foreign_mass,
    idle_drift,
    ids_to_compare,
    reach_bound,
    reach_by_teacher,
)
from taopd.trainer.checkpoint.same_start import SameStart
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import LossInputs, Term
from taopd.trainer.reference_student import ReferenceStudent
from taopd.trainer.remembered_start import OfTeacher, RememberedStart
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.selection import guard_is_due, reads_initial, signal_needs
from taopd.trainer.settings.methods import judges
from taopd.trainer.step_metrics import Recorder
from taopd.trainer.watches.collapse_guard import CollapseGuard


class Anchor:
    """KL penalty and guard measurement of one trainer; does nothing where both are off.

    Args:
        head_of: the head of a prepared model, cut to the shared ids.
        guard: None: collapse_guard is off.
        stop_ids: one token for reach where `stop_tokens: merge`.
        foreign_ends: ids that end the teacher's texts alone: out of reach.
        reference: of the student before training, where somebody else needs it too; None: made if needed.
        trains: False: no step will follow, and no copy of the student is made.
    """

    def __init__(
        self,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        accelerator: Accelerator,
        recorder: Recorder,
        head_of: Callable[[Any], Head],
        guard: CollapseGuard | None,
        stop_ids: Sequence[int],
        foreign_ends: Sequence[int],
        reference: ReferenceStudent | None = None,
        *,
        trains: bool = True,
    ) -> None:
        self._args, self._recorder, self._head_of, self._guard = args, recorder, head_of, guard
        self._function = resolve_loss(args.anchor_loss)
        self._coefficient = args.anchor_coef or 0.0
        needs = signal_needs(args).signals
        self._reads_reach = not INITIAL_GIVES.isdisjoint(needs)
        self._reads_start = not OF_THE_START.isdisjoint(needs)
        # What is run for shadows alone must not be trained on: other rows together round otherwise.
        self._trains_on_all = reads_initial(args, shadows=False)
        everywhere = self._reads_reach or self._reads_start
        self._merged = merged_ids(args.stop_tokens, stop_ids)
        self._reach_rule: dict[str, Any] = {
            "threshold": args.reach_threshold,
            "foreign_ends": foreign_ends,
        }
        needed = self._coefficient > 0.0 or guard is not None or everywhere
        self.start = SameStart(student, accelerator, needed=needed or reference is not None)
        """A callback, for a run that is resumed."""
        # An adapter's is made all the same: it is small, and refuses what cannot be exchanged.
        if needed and reference is None and (trains or is_peft_model(student)):
            reference = ReferenceStudent(student, accelerator)
        self._reference = reference if needed else None
        remembers = judges(args) and args.anchor_responses < 1.0 and not self._reads_start
        given = {"temperature": args.temperature, "stop_ids": self._merged}
        self._reach_from = self._reach_rule | given
        self.memory = RememberedStart(args, accelerator, self._reach_from) if remembers else None
        """A callback, where the reference model runs on some completions alone."""
        self._states: Float[Tensor, "m D"] | None = None
        """The reference model's at tokens of the batch that is being selected from."""
        self._run_at: Bool[Tensor, " N"] | None = None
        """These tokens; None: all of them."""

    def with_initial(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        scored: Scored,
        teacher_heads_of: Callable[[], Sequence[Head | None]],
        of_teacher: Int[Tensor, " N"] | None,
        *,
        step: int | None,
    ) -> Scored:
        """The scores with reach, or with D and C of the reference model, where a setting reads them.

        The reference model is run at every token, or at those that `RememberedStart` names.

        Args:
            step: of the run; None: of an evaluation.
            teacher_heads_of: gives one a teacher; None for one elsewhere: reach then is a lower bound, at the
                tokens of all teachers, so that no selection mixes two kinds.
            of_teacher: which teacher each token has; None: there is one.
        """
        if not (self._reads_reach or self._reads_start):
            return scored
        assert self._reference is not None
        args, signals = self._args, scored.signals
        found: dict[str, Any] = {}
        with self._recorder.timed("perf/anchor_s"):
            given = teacher_heads_of()
            heads = [one for one in given if one is not None]
            exact = len(heads) == len(given)
            at, here = positions, None
            # The answer of a teacher elsewhere is compared with the reference model's lists at every token.
            if self.memory is not None and exact and step is not None:
                here = self.memory.where(positions, step)
                at = positions.at(here)
            self._run_at, size = here, args.per_device_train_batch_size
            self._states = self._reference.states(forward, student, batch, at, size)
            head = self._reference.head(self._head_of, student)
            teachers = _by_teacher(scored, heads, of_teacher) if exact else []
            if self.memory is not None and here is not None:
                of_start = self._states, head
                found = self.memory.judge(signals, positions, here, of_start, teachers)
                found |= self._foreign(scored, teachers)
            elif self._reads_reach and exact:
                found = self._exact_reach(scored, teachers, head)
            elif self._reads_reach:
                *lists, initial = self._at_lists(self._states, head, signals)
                ends = self._reach_rule["foreign_ends"]
                found = {
                    "reach": reach_bound(signals, *lists, **self._reach_rule),
                    "foreign": foreign_bound(signals, ends) if ends else None,
                    INITIAL: initial,
                }
            if self._reads_start:
                # A teacher elsewhere was refused: it sends no distribution for the initial student's ids.
                assert exact
                found |= self._of_the_start(scored, teachers, head)
        scored = replace(scored, signals=replace(signals, **found))
        # By reach every loss is in part an exact one; not where reach is another method's compatibility.
        if needs_teacher_distribution(args.loss) or (exact and judges(args)):
            return scored
        return replace(scored, teacher_hidden=None, parts=())

    def _exact_reach(
        self, scored: Scored, teachers: Sequence[OfTeacher], head: Head
    ) -> dict[str, Any]:
        """r, f and log p_S0 of every token, by its own teacher; `head` is the reference model's."""
        tokens = scored.signals.token_ids
        assert self._states is not None and tokens is not None
        found = reach_by_teacher((self._states, head), teachers, tokens, **self._reach_from)
        return dict(zip(("reach", INITIAL), found, strict=True)) | self._foreign(scored, teachers)

    def _foreign(self, scored: Scored, teachers: Sequence[OfTeacher]) -> dict[str, Any]:
        """f of every token, where there are foreign ends."""
        ends = self._reach_rule["foreign_ends"]
        if not ends:
            return {"foreign": None}
        foreign = torch.zeros_like(scored.signals.compatibility)
        for index, hidden, head in teachers:
            mass = foreign_mass(hidden, head, ends, temperature=self._args.temperature)
            foreign[index] = mass.to(foreign.dtype)
        return {"foreign": foreign}

    def _of_the_start(
        self, scored: Scored, teachers: Sequence[OfTeacher], head: Head
    ) -> dict[str, Float[Tensor, " N"]]:
        """D and C of the reference model with each token's own teacher."""
        assert self._states is not None and scored.signals.token_ids is not None
        found = {name: torch.zeros_like(scored.signals.disagreement) for name in OF_THE_START}
        for index, hidden, teacher_head in teachers:
            start = exact_signals(
                self._states[index],
                head,
                hidden,
                teacher_head,
                scored.signals.token_ids[index],
                k=self._args.score_top_k,
                temperature=self._args.temperature,
                stop_ids=self._merged,
            )
            found["initial_disagreement"][index] = start.disagreement
            found["initial_compatibility"][index] = start.compatibility
        return found

    def measure(self, forward: Forward, student: Any, scored: ScoredBatch) -> dict[str, Any]:
        """Run the reference model where it is needed; the states of it that the penalty will read."""
        choice, positions = scored.choice, scored.positions
        everywhere, self._states = self._states, None
        if self._reference is None or not scored.table.ranks.any(choice.reference_mask):
            return {}
        # The choice is on the CPU, where all processes made it; the states are on the device.
        device = positions.row.device
        tokens = choice.reference_mask[scored.local].to(device)
        size = self._args.per_device_train_batch_size
        with self._recorder.timed("perf/anchor_s"):
            if everywhere is None or not self._trains_on_all:
                here = positions.at(tokens)
                hidden = self._reference.states(forward, student, scored.batch, here, size)
            else:
                # The tokens that are held lie in the completions at which it was run.
                run_at = self._run_at
                hidden = everywhere[tokens if run_at is None else tokens[run_at]]
        if self._guard is not None and guard_is_due(scored.step, self._args):
            with self._recorder.timed("perf/guard_s"):
                head = self._reference.head(self._head_of, student)
                drift = self._drift(hidden, head, scored.signals, tokens)
                of_batch = scored.step, scored.table, choice
                self._guard.measure(*of_batch, drift)
        if self._coefficient == 0.0:
            return {}
        # Where all of a drawn token is within reach, nothing of it is held at the start.
        held = choice.anchor_weights[scored.local].float().to(device)[tokens] != 0
        return {"reference_hidden": positions.at(tokens).by_row(hidden, held)}

    def term(self, student: Any, inputs: LossInputs) -> Term | None:
        """The penalty of a micro-batch, None where the anchor is off; `student` is unwrapped."""
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
        at_students, at_teachers, _ = self._at_lists(hidden, head, signals, tokens)
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

    def _at_lists(
        self,
        hidden: Tensor,
        head: Head,
        signals: TokenSignals,
        tokens: Bool[Tensor, " N"] | slice = slice(None),
    ) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"], Float[Tensor, " n"]]:
        """The reference model's log-probs at the student's list, at the teacher's, and at the token; nats."""
        assert signals.token_ids is not None
        students, teachers = signals.student_topk_ids[tokens], signals.teacher_topk_ids[tokens]
        ids = ids_to_compare(students, teachers)
        scores = topk_score(
            hidden,
            head,
            signals.token_ids[tokens],
            k=1,
            temperature=self._args.temperature,
            want_ids=ids,
        )
        # One scan of the head for both lists: the scan costs as much as a forward of a small model.
        assert scores.want_logprobs is not None
        at_students, at_teachers = scores.want_logprobs.split(
            [students.shape[1], teachers.shape[1]], dim=1
        )
        return at_students, at_teachers, scores.target_logprobs


def _by_teacher(
    scored: Scored, heads: Sequence[Head], of_teacher: Int[Tensor, " N"] | None
) -> list[OfTeacher]:
    """Those that have tokens here: the rows of others may be on other processes alone."""
    return [
        (index, hidden, heads[0 if of_teacher is None else int(of_teacher[index][0])])
        for index, hidden in scored.by_teacher()
        if len(hidden)
    ]
