"""`TeachabilityTrainer`: `trl.DistillationTrainer` that trains only on the tokens that a selector keeps.

One step: sample the whole generation batch, score it once with both models, select over all of it, then per
micro-batch run the student on the rows that hold a kept token, and apply head and loss there alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from taopd.errors import NumericsError
from taopd.kernels import Head
from taopd.models.batch import Positions, Trimmed, trim
from taopd.models.gradient_window import gradients_of
from taopd.models.output_head import read_head
from taopd.models.scoring import Scored
from taopd.models.stop_tokens import foreign_ends, merged_ids, stop_ids
from taopd.signals.merge_stops import scan_width
from taopd.trainer.anchor import Anchor
from taopd.trainer.base import BaseTrainer, Batch
from taopd.trainer.build.given_arguments import check_given, check_made, given_models, name_teacher
from taopd.trainer.build.given_student import given_student
from taopd.trainer.build.own_teacher import OwnTeacher
from taopd.trainer.build.tools import given_tools
from taopd.trainer.callbacks import MetricsWriter, PeakMemory, ProcessTime, UpdateNorm
from taopd.trainer.checkpoint.process_state import RankState
from taopd.trainer.checkpoint.same_inputs import SameInputs
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.gather import gather_table, is_not_repeated
from taopd.trainer.loss import (
    LossInputs,
    distillation_terms,
    loss_columns,
    loss_of_run,
    term_loss,
)
from taopd.trainer.metrics import selection_metrics, teacher_metrics
from taopd.trainer.nonfinite import NonFiniteGuard
from taopd.trainer.rollout_log import RolloutLog
from taopd.trainer.sampler_monitor import SamplerMonitor
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.selection import choose, gather_options, local_table, signal_needs
from taopd.trainer.step_lines import attach as attach_step_lines
from taopd.trainer.step_metrics import LOSS_PARTS, Recorder
from taopd.trainer.student import StudentForward
from taopd.trainer.teacher_routes import teachers_of
from taopd.trainer.watches.collapse_guard import CollapseGuard
from taopd.trainer.watches.run_warnings import RunWarnings
from taopd.trainer.watches.situation_watch import SituationWatch
from taopd.trainer.watches.spread_watch import SpreadWatch


class TeachabilityTrainer(BaseTrainer):
    """Selective on-policy distillation (arXiv 2605.26844); takes what `trl.DistillationTrainer` takes.

    Args:
        model: the student: a path, a hub id, a `PreTrainedModel` or a `PeftModel`. Of a LoRA folder or a
            `PeftModel` the adapter is trained further; with `peft_config` it is merged first.
        teacher_model: the teacher, in one of the same forms; default `args.teacher_model_name_or_path`. Its
            vocabulary may be padded to another size, but its tokenizer must give every shared id the same
            token. "self" and "self_ema" are the student, with a prompt of the teacher's own. A
            `taopd.teachers.Teacher` of your own is asked for log-probs. A mapping holds several teachers by
            name; each prompt names its own in `args.teacher_column`. None with `args.teacher_url`.
        args: a `TeachabilityConfig`. A `DistillationConfig` gets our defaults for what it lacks; None stands
            for all defaults.
        others: the arguments of TRL's class, in its order: `train_dataset`, `eval_dataset` and so on.

    Raises:
        ConfigError: settings that do not fit each other.
        DataError: different tokenizers, or batch after batch without a token.
        NumericsError: NaN or infinite logits, loss or gradient; see `NonFiniteGuard`.
    """

    _tag_names = ["trl", "distillation", "taopd"]  # noqa: RUF012 (TRL's attribute)
    _name = "Teachability-Aware Distillation"

    def __init__(
        self,
        model,
        teacher_model=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
    ):
        model, teacher_model = given_models(model, teacher_model)
        args = TeachabilityConfig.of(args, model)
        name_teacher(args, teacher_model)
        check_given(args, model, callbacks, optimizers, quantization_config, tools)
        given = given_student(model, args, processing_class, peft_config, quantization_config)
        quantization = None if isinstance(model, str) else quantization_config
        # TRL refuses vocabularies padded to different sizes, so the teacher is attached below instead.
        super().__init__(
            *(given.model, None, args, train_dataset, eval_dataset, given.processing_class),
            *(callbacks, optimizers, quantization, peft_config, given_tools(args, tools)),
        )
        args.model_init_kwargs = given.options
        self._given = given.made(self.model, peft_config)
        check_made(args, self.model, optimizers[0], self.accelerator)
        self._check_training_set()
        whole = self.model, self.accelerator, lambda: self.model_wrapped
        itself = OwnTeacher.of(args, *whole)
        self.average, start = (itself.average, itself.start) if itself else (None, None)
        self._teacher = teachers_of(itself or teacher_model, args, *whole[:2], self._tokenizer)
        self._check_routes()
        self._check_lengths()
        self.teacher_model, self.vocab_size = self._teacher.model, self._teacher.vocab_size
        stops = args.stop_tokens, args.stop_token_ids
        self.stop_ids = stop_ids(*stops, self._tokenizer, self.model, *self._teacher.plains)
        # The first batch would be refused otherwise, after it was sampled.
        scan_width(args.score_top_k, merged_ids(stops[0], self.stop_ids), self.vocab_size)
        self.foreign_ends = foreign_ends(*stops, self.eos_token_ids, *self._teacher.plains)
        ends = self.stop_ids, self.foreign_ends
        self._loss_function = loss_of_run(args, *ends, self.eos_token_ids, self.vocab_size)
        # Resolved once a run: names, expressions and dotted paths do not change between steps.
        self._needs = signal_needs(args)
        self._gather_options = gather_options(args)
        self._recorder = Recorder()
        self.rank_state = RankState(self)
        self.nonfinite = NonFiniteGuard(args, self.accelerator, self._tokenizer, self._recorder)
        found = RunWarnings(args.output_dir, self.accelerator)
        tell = self.record, found.add, self._load_from_checkpoint
        self.guard = CollapseGuard.of(args.collapse_guard, args.output_dir, self.accelerator, *tell)
        parts = self.model, self.accelerator, self._recorder, self._head, self.guard
        self._anchor = Anchor(args, *parts, *ends, start, trains=self.trains)
        self._student = StudentForward(self.model, self.accelerator, self._recorder, args)
        self.sampler_monitor = SamplerMonitor(self)
        asked = args.log_rollouts, args.log_selection
        log = RolloutLog(args.output_dir, *asked, steps_per_batch=args.num_iterations)
        situation = SituationWatch.of(args, self.record, self.foreign_ends)
        watchers: list[Any] = [self.sampler_monitor, self._teacher.watch(found.add), situation]
        self.observers: list[Callable[[ScoredBatch], None]] = [log, *watchers]
        """Called on the main process after every selection, in training."""
        own = (self.rank_state, self.nonfinite, found, MetricsWriter(), SpreadWatch(args))
        costs = PeakMemory(self.record), ProcessTime(self.record)
        # The average follows the update as it was rescaled.
        last = UpdateNorm.of(args, self.accelerator, self.record), self.average, self._anchor.memory
        for callback in (*own, *costs, self._anchor.start, SameInputs(self), *watchers, *last):
            if callback is not None:
                self.add_callback(callback)
        # First: what others do at the end of training they do with the weights that it leaves.
        self.callback_handler.callbacks[:0] = [self.guard] if self.guard else []
        attach_step_lines(self)

    # -- a generation batch: sample, score, select ------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        """TRL's stage between the prompts and the micro-batches: all that is done once a generation batch."""
        with self._recorder.timed("perf/sample_s"):
            batch = super()._generate_and_score_completions(inputs) | self._teacher.route(inputs)
        batch, selected = self._with_loss_columns(batch)
        self._tell_observers(selected, [row.get("answer") for row in inputs])
        return batch

    def _with_loss_columns(self, batch: Batch) -> tuple[Batch, ScoredBatch]:
        """A batch of TRL's with what the loss reads of it, and what was selected."""
        positions = self._trainable_positions(batch)
        with self._recorder.timed("perf/score_s"):
            positions, scored = self._score(batch, positions)
        models = self.forward_states, self.model_wrapped
        teachers = self._teacher_heads, self._teacher.of_positions(batch, positions)
        step = self.state.global_step if self.model.training else None
        scored = self._anchor.with_initial(*models, batch, positions, scored, *teachers, step=step)
        with self._recorder.timed("perf/select_s"):
            selected = self._select(batch, positions, scored)
        reference = self._anchor.measure(*models, selected)
        return batch | loss_columns(scored, selected, self.args) | reference, selected

    def _trainable_positions(self, batch: Batch) -> Positions:
        """Completion tokens that may train; ids that one of the models lacks leave the batch."""
        mask = batch["completion_mask"].bool().clone()
        # An evaluation's last batch is filled up with prompts that were graded before.
        mask &= self.model.training | is_not_repeated(self.accelerator, mask)
        mask &= batch.get("tool_mask", mask).bool()
        mask &= self.nonfinite.with_tokens(mask, self.model.training)
        ids = batch["completion_ids"]
        inside = ids < self.vocab_size
        outside = (mask & ~inside).sum() / mask.sum().clamp_min(1)
        # One model cannot read such a token, nor judge what follows it.
        batch["completion_ids"] = ids.where(inside, 0)
        self._recorder.add_all(
            {"rollout/outside_vocabulary": float(outside), "perf/sample_tokens": int(mask.sum())}
        )
        return Positions.of(mask & inside.long().cummin(1).values.bool())

    @torch.no_grad()
    def _score(self, batch: Batch, positions: Positions) -> tuple[Positions, Scored]:
        """Signals of every position, and the states there that the loss will read; or of none."""
        training, step, problem = self.model.training, self.state.global_step, None
        reuse = self._student.start_scoring(
            training, batch["prompt_mask"], self._forward_keeping_prefix
        )
        # Dropout is off while scoring, unless this pass is the training forward (which then has none).
        self.model.train(reuse.keep_student_graph)
        try:
            scored = self._teacher.score(
                self.forward_states,
                self.model_wrapped,
                batch,
                positions,
                stop_ids=self.stop_ids,
                when=f"step {step}",
                reuse=reuse,
            )
        except NumericsError as error:
            problem = error
        finally:
            self.model.train(training)
        if self.nonfinite.scored(problem, batch, step, training):
            # All processes score again, of no position: the collectives of a forward need every one of them.
            nothing = torch.zeros(positions.shape, dtype=torch.bool, device=positions.row.device)
            return self._score(batch, Positions.of(nothing))
        self._student.finish_scoring(positions)
        return positions, scored

    @torch.no_grad()
    def _select(self, batch: Batch, positions: Positions, scored: Scored) -> ScoredBatch:
        """The tokens that train, chosen over the generation batch of all processes."""
        training, step, signals = self.model.training, self.state.global_step, scored.signals
        place = positions.row, positions.column
        own = self._teacher.of_positions(batch, positions)
        rows = local_table(
            signals, self.args, *place, self.stop_ids, needs=self._needs, teacher=own
        )
        part, table, local = gather_table(
            self.accelerator, rows, num_rows=positions.shape[0], **self._gather_options
        )
        # A pure function of the gathered table: every process comes to the same choice on its own.
        names, weights = self._teacher.names, self._teacher.weights
        run = {"step": step, "num_steps": self.state.max_steps, "training": training}
        run["distribution"] = len(self._teacher.plains) == max(1, len(names))
        choice = choose(table, self.args, **run, teacher_weights=weights)
        if training:
            self.nonfinite.chosen(table.ranks.any(choice.trains))
        found = choice.selection, choice.budget, choice.shadows
        metrics = selection_metrics(table, *found, part=part)
        metrics |= teacher_metrics(table, choice.selection, names)
        self._recorder.add_all({"perf/score_tokens": positions.row.shape[0]} | metrics)
        return ScoredBatch(
            step=step,
            batch=batch,
            positions=positions,
            token_ids=batch["completion_ids"][place],
            signals=signals,
            table=table,
            choice=choice,
            local=local,
            stop_ids=(*self.eos_token_ids, self._tokenizer.pad_token_id),
            tokenizer=self._tokenizer,
            teachers=names,
        )

    def _tell_observers(self, selected: ScoredBatch, answers: list[Any]) -> None:
        if self.model.training and self.accelerator.is_main_process:
            seen = replace(selected, batch=selected.batch | {"answers": answers})
            for observer in self.observers:
                observer(seen)

    # -- a micro-batch: the loss ------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student, inputs: Batch, num_items_in_batch):
        """The loss of a micro-batch; entropy and tokens to log. Runs inside the wrapper's forward."""
        read = LossInputs.of(inputs)
        part = trim(inputs, read.active)
        # Forward the student, over what the loss depends on.
        hidden = self._student.hidden_states(
            self._get_last_hidden_state, unwrapped_student, part, read
        )
        # The head is read after the states, so that the backward reaches it first: FSDP2 reduces the head's
        # gradient together with the last norm's, and would miss it otherwise.
        head = read_head(unwrapped_student, self.vocab_size)
        # The terms. A bad one must not leave the other processes waiting: it gives way to a loss of 0 from
        # the states at hand, and the end of the backward tells everyone.
        try:
            if self._student.is_check_due(self.state.global_step, self._step):
                self._check_gradient(unwrapped_student, part, read)
            losses = self._terms(unwrapped_student, hidden, head, part, read)
        except NumericsError as error:
            losses = [self.nonfinite.zero_loss(error, hidden, head)]
        # Their sum. DDP and FSDP average gradients over processes; the weights already hold the global
        # denominator.
        terms = zip(LOSS_PARTS, losses, (1.0, self.args.anchor_coef or 1.0), strict=False)
        for name, term, factor in () if self.nonfinite.void else terms:
            self._recorder.add(name, term.item() / factor)
        loss = torch.stack(losses).sum() * self.accelerator.num_processes
        # FSDP2 hands the loss out in the compute dtype: the float32 value goes past the wrapper.
        self._loss_value = loss.detach()
        # Not the completion mask: it holds a tool's results too, which have no entropy.
        return loss, read.entropy.sum(), read.scored.sum()

    def _terms(self, student, hidden: Tensor, head: Head, part: Trimmed, read: LossInputs):
        """Distillation from the teachers, and where the anchor is on the KL penalty."""
        terms = distillation_terms(read, self._teacher_heads(), self._loss_function)
        anchor = self._anchor.term(student, read)
        losses = [
            term_loss(term, hidden, head, part=part, inputs=read, temperature=self.temperature)
            for term in (*terms, *(() if anchor is None else (anchor,)))
        ]
        return [torch.stack(losses[: len(terms)]).sum(), *losses[len(terms) :]]

    def _check_gradient(self, student, part: Trimmed, read: LossInputs) -> None:
        """Log how well the gradient of the window agrees with the exact one, on this micro-batch."""
        with self._student.gradient_check() as gradients:
            # One after the other: only one of the two graphs is in memory at a time.
            for exact in (True, False):
                if exact:
                    hidden = self._get_last_hidden_state(student, *part.sequences)
                else:
                    hidden, _ = self._student.windowed_states(student, part, read, None)
                head = read_head(student, self.vocab_size)
                losses = self._terms(student, hidden, head, part, read)
                gradients.append(gradients_of(torch.stack(losses).sum(), student))
