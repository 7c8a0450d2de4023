"""The KL penalty to the reference model, and the measurement that the collapse guard reads.

Both need the student as it was before training (the reference model) at some unselected tokens of the batch:
`Choice.reference_mask` says at which, and one forward on the completions that hold them serves both.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from taopd.distributed.sharding import gathered, prepare_frozen
from taopd.errors import ConfigError
from taopd.kernels import Head, topk_score
from taopd.losses import resolve_loss
from taopd.models.batch import Forward, Positions
from taopd.models.forward import states_at
from taopd.signals import TokenSignals, at_ids, idle_drift, ids_to_compare
from taopd.trainer.collapse_guard import CollapseGuard
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import LossInputs, Term
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.step_metrics import Recorder


class Anchor:
    """KL penalty and guard measurement of one trainer; does nothing where both are off.

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
        self._coefficient = args.anchor_coef or 0.0
        needed = self._coefficient > 0.0 or guard is not None
        self._reference = ReferenceStudent(student, accelerator) if needed else None

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


class ReferenceStudent:
    """The student before training: a frozen copy, or with an adapter a frozen copy of what trains.

    Args:
        student: as it is given to the trainer, before any step.

    Raises:
        ConfigError: an adapter that was trained before, under ZeRO-3.
    """

    def __init__(self, student: PreTrainedModel, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.copy: Any = None
        """The prepared copy, or None where the weights that train are exchanged instead."""
        self._start: dict[str, Tensor] = {}
        """These weights before training, by name. The adapter may have been trained before: switching it off
        would give another model than the one that training began with."""
        self._head: Head | None = None
        self._switched_off = False
        if not is_peft_model(student):
            # A copy of shards would be a copy of parts: ZeRO-3 puts them together first.
            with gathered(student.parameters()):
                frozen = copy.deepcopy(student).requires_grad_(False)
            # Dropout would be part of the reference.
            self.copy = prepare_frozen(accelerator, frozen.eval())
            return
        trained = {name: w for name, w in student.named_parameters() if w.requires_grad}
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            # Its shards cannot be exchanged; a fresh LoRA changes nothing yet, and can be switched off.
            with gathered(trained.values()):
                fresh = all(not w.any() for name, w in trained.items() if "lora_A" not in name)
            if not fresh:
                raise ConfigError(
                    "under ZeRO-3 the anchor and the collapse guard have no reference for an adapter that "
                    "was trained before: use ZeRO-2, or set method: published and collapse_guard: off"
                )
            self._switched_off = True
            return
        self._start = {name: weight.detach().clone() for name, weight in trained.items()}

    @torch.no_grad()
    def states(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        mask: Bool[Tensor, "B T"],
        micro_batch_size: int,
    ) -> list[Float[Tensor, "n D"]]:
        """Hidden states that predict the tokens in the mask, one tensor per row of the batch."""
        positions = Positions.of(mask)
        with self._weights(student) as reference:
            parts = list(states_at(forward, reference, batch, positions, micro_batch_size))
        hidden = torch.cat([states for states, _ in parts])
        return positions.by_row(hidden, torch.ones_like(positions.row, dtype=torch.bool))

    @torch.no_grad()
    def head(self, head_of: Callable[[Any], Head], student: Any) -> Head:
        """The reference model's head."""
        if self.copy is not None:
            return head_of(self.copy)
        inner = self._accelerator.unwrap_model(student)
        if not inner.get_output_embeddings().weight.requires_grad:
            return head_of(student)
        if self._head is None:
            # The head itself trains: its values are those of now once the weights are exchanged back.
            with self._weights(student):
                head = head_of(student)
                self._head = replace(head, weight=head.weight.clone())
        return self._head

    @contextmanager
    def _weights(self, student: Any) -> Iterator[Any]:
        if self.copy is not None:
            yield self.copy
            return
        inner = self._accelerator.unwrap_model(student)
        weights = {name: w for name, w in inner.named_parameters() if name in self._start}
        now = {name: weight.data.clone() for name, weight in weights.items()}
        training = inner.training
        inner.eval()
        adapter = inner.disable_adapter() if self._switched_off else nullcontext()
        try:
            # `.data`: the values are back before any backward of a recorded forward reads them.
            for name, weight in weights.items():
                weight.data.copy_(_laid_out(self._start[name], weight))
            with adapter:
                yield student
        finally:
            for name, weight in weights.items():
                weight.data.copy_(now[name])
            inner.train(training)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor sharded as another one is."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
