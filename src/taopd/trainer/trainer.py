"""`TeachabilityTrainer`: `trl.DistillationTrainer` that trains only on the tokens that a selector keeps.

One step: sample the whole generation batch, score it once with both models, select over all of it, then per
micro-batch run the student on the rows that hold a kept token, and apply head and loss there alone.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import ProcessorMixin
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from taopd.errors import ConfigError, DataError, NumericsError
from taopd.kernels import Head
from taopd.losses import resolve_loss
from taopd.models.batch import Positions, Trimmed, trim
from taopd.models.loading import safe_options
from taopd.models.output_head import head_dtype, read_head
from taopd.models.scoring import Scored
from taopd.models.stop_tokens import stop_ids
from taopd.trainer.anchor import HeldTokens
from taopd.trainer.callbacks import MetricsWriter, PeakMemory, UpdateNorm
from taopd.trainer.checkpoint.mixin import AtomicCheckpoints
from taopd.trainer.checkpoint.process_state import RankState
from taopd.trainer.collapse_guard import CollapseGuard
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.gather import gather_table, is_not_repeated
from taopd.trainer.loss import Term, loss_inputs, loss_terms, with_value
from taopd.trainer.metrics import selection_metrics
from taopd.trainer.nonfinite import BadNumbers
from taopd.trainer.rollout_log import RolloutLog, ScoredBatch
from taopd.trainer.sampler_monitor import SamplerWatch
from taopd.trainer.selection import Chooser, check_size, gather_options, local_table
from taopd.trainer.step_metrics import Recorder
from taopd.trainer.student import StudentStates
from taopd.trainer.teacher import TeacherSource

Batch = dict[str, Any]


class TeachabilityTrainer(AtomicCheckpoints, DistillationTrainer):
    """Selective on-policy distillation (arXiv 2605.26844); takes what `trl.DistillationTrainer` takes.

    Args:
        model: student, a path, a hub id or a `PreTrainedModel`.
        teacher_model: teacher, likewise; default `args.teacher_model_name_or_path`. Its vocabulary may be
            padded to another size; its tokenizer must give every shared id the same token. Or any
            `taopd.teachers.Teacher`, which is asked for numbers; None with `args.teacher_url`.
        args: a `TeachabilityConfig`.

    Raises:
        ConfigError: settings that do not fit each other.
        DataError: different tokenizers, a multimodal student, or batch after batch without a token.
        NumericsError: NaN or infinite logits, loss or gradient; see `BadNumbers`.
    """

    _tag_names = ["trl", "distillation", "taopd"]  # noqa: RUF012 (TRL's attribute)
    _name = "Teachability-Aware Distillation"

    def __init__(self, model, teacher_model=None, args: TeachabilityConfig | None = None, **kwargs):
        if not isinstance(args, TeachabilityConfig):
            raise ConfigError("args must be a taopd.TeachabilityConfig (a DistillationConfig)")
        if isinstance(model, str):
            args.model_init_kwargs = safe_options(args.model_init_kwargs)
        # TRL refuses vocabularies padded to different sizes, so the teacher is attached below instead.
        super().__init__(model=model, teacher_model=None, args=args, **kwargs)
        if isinstance(self.processing_class, ProcessorMixin):
            raise DataError("multimodal students are not supported: pass a text model")
        size, streaming = (
            self._generation_batch_size(),
            isinstance(self.train_dataset, IterableDataset),
        )
        args.check_generation_batch(size, streaming=streaming)
        check_size(args, size, self.accelerator.num_processes)
        self._teacher = TeacherSource(
            teacher_model, args, self.model, self._tokenizer, self.accelerator
        )
        self.teacher_model, self.vocab_size = self._teacher.model, self._teacher.vocab_size
        if args.score_top_k > self.vocab_size:
            raise ConfigError(
                f"score_top_k={args.score_top_k}: larger than the vocabulary of {self.vocab_size} ids"
            )
        stops = args.stop_tokens, args.stop_token_ids
        self._stop_ids = stop_ids(*stops, self._tokenizer, self.model, self._teacher.plain)
        self._loss_function = resolve_loss(
            args.loss,
            beta=float(args.beta or 0.0),
            k=args.score_top_k,
            clip_low=args.ppo_clip_low,
            clip_high=args.ppo_clip_high,
            merged_ids=self._stop_ids if args.stop_tokens == "merge" else (),
        )
        self._recorder = Recorder()
        self.rank_state = RankState(self)
        self.add_callback(self.rank_state)
        self.numbers = BadNumbers(args, self.accelerator, self._tokenizer, self._recorder)
        self.add_callback(self.numbers)
        guard = None
        if args.collapse_guard != "off":
            sinks = self._record, self._load_from_checkpoint
            guard = CollapseGuard(args.collapse_guard, args.output_dir, self.accelerator, *sinks)
            self.add_callback(guard)
        shared = self.model, self.accelerator, self._recorder
        self._held = HeldTokens(args, *shared, self._head, guard)
        self._student_states = StudentStates(self.model, self.accelerator, self._recorder, args)
        self.watch = SamplerWatch(self)
        self.observers: list[Callable[[ScoredBatch], None]] = [
            RolloutLog(args.output_dir, args.log_rollouts, args.log_selection),
            self.watch,
        ]
        """Called on the main process after every selection, in training."""
        self._choose = Chooser()
        for added in (self._choose, MetricsWriter(), PeakMemory(self._record), self.watch):
            self.add_callback(added)
        norms = args.match_update_norm, args.max_update_norm
        if (args.log_update_norm or norms != (None, None)) and self.layout != "deepspeed":
            self.add_callback(UpdateNorm(self._record, *norms))

    # -- sampling ---------------------------------------------------------------------------------

    def _generation_batch_size(self) -> int:
        args = self.args
        local = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return local * self.accelerator.num_processes

    def _get_train_sampler(self, dataset=None):
        args = self.args
        sampler = RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=self._generation_batch_size() // args.num_generations,
            repeat_count=args.gradient_accumulation_steps * args.num_iterations,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )
        if dataset is None or dataset is self.train_dataset:
            self._sampler = sampler
        return sampler

    def _prepare_inputs(self, generation_batch):
        accumulation = self.args.gradient_accumulation_steps
        iteration = (self._step // accumulation) % self.args.num_iterations
        if self.model.training and iteration > 0 and self._buffered_inputs is not None:
            return self._buffered_inputs[self._step % accumulation]
        return super()._prepare_inputs(generation_batch)

    def _generate_single_turn(self, *args, **kwargs) -> list[list[int]]:
        with self.watch.listening():
            completions = super()._generate_single_turn(*args, **kwargs)
        self.numbers.sampled(completions)
        # TRL reads every completion's last token; where nothing was sampled nothing will train either.
        return [ids or [self._tokenizer.eos_token_id] for ids in completions]

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        with self._recorder.timed("perf/sample_s"):
            batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"].bool()
        mask &= self.model.training | is_not_repeated(self.accelerator, mask)
        mask &= batch.get("tool_mask", mask).bool()
        mask &= self.numbers.with_tokens(mask)
        ids, pad = batch["completion_ids"], self._tokenizer.pad_token_id
        inside = ids < self.vocab_size
        outside = (mask & ~inside).sum() / mask.sum().clamp_min(1)
        self._recorder.add("rollout/outside_vocabulary", float(outside))
        self._recorder.add("perf/sample_tokens", int(mask.sum()))
        # One model cannot read such a token, nor judge what follows it.
        batch["completion_ids"] = ids.where(inside, pad)
        positions = Positions.of(mask & inside.long().cummin(1).values.bool())
        with self._recorder.timed("perf/score_s"):
            positions, scored = self._score(batch, positions)
        answers = {"answers": [row.get("answer") for row in inputs]}
        return batch | self._select(batch | answers, positions, scored)

    # -- scoring ----------------------------------------------------------------------------------

    def _get_last_hidden_state(self, *args, **kwargs) -> Tensor:
        # TRL calls the backbone past the wrapper's forward, where accelerate put the autocast: without this
        # line bf16=True would train in float32. The head gets the dtype it would have had there.
        with self.accelerator.autocast():
            return head_dtype(super()._get_last_hidden_state(*args, **kwargs))

    @torch.no_grad()
    def _score(self, batch: Batch, positions: Positions) -> tuple[Positions, Scored]:
        """Signals of every valid position, and the states there that the loss will read; or of none."""
        training, step, problem = self.model.training, self.state.global_step, None
        reuse = self._student_states.start_scoring(training, batch["prompt_mask"], self._forward)
        self.model.train(reuse.keep_student_graph)
        try:
            scored = self._teacher.score(
                self._forward,
                self.model_wrapped,
                batch,
                positions,
                stop_ids=self._stop_ids,
                temperature=self.temperature,
                when=f"step {step}",
                reuse=reuse,
            )
        except NumericsError as error:
            problem = error
        finally:
            self.model.train(training)
        if self.numbers.scored(problem, batch, step, training):
            nothing = torch.zeros(positions.shape, dtype=torch.bool, device=positions.row.device)
            return self._score(batch, Positions.of(nothing))
        self._student_states.finish_scoring(positions)
        self._recorder.add("perf/score_tokens", len(positions))
        return positions, scored

    def _forward(self, wrapped, part: Trimmed, states=None) -> tuple[Tensor, Head]:
        """Backbone (or `states`) and head of a model, inside its DDP or FSDP wrapper."""
        unwrapped = self.accelerator.unwrap_model(wrapped)

        def forward(*inputs) -> tuple[Tensor, Head]:
            hidden = (states or self._get_last_hidden_state)(unwrapped, *inputs)
            return hidden, read_head(unwrapped, self.vocab_size)

        return self._forward_redirection(wrapped, unwrapped, forward, *part.sequences)

    # -- selection --------------------------------------------------------------------------------

    @torch.no_grad()
    def _select(self, batch, positions: Positions, scored: Scored) -> Batch:
        """Choose over all ranks; return what the loss needs, aligned with the rows of this rank's batch."""
        training, step, signals = self.model.training, self.state.global_step, scored.signals
        with self._recorder.timed("perf/select_s"):
            place = positions.row, positions.column
            local = local_table(signals, self.args, *place, self._stop_ids)
            which = {"num_rows": positions.shape[0], **gather_options(self.args)}
            part, table, mine = gather_table(self.accelerator, local, **which)
            choice = self._choose(table, self.args, step=step, training=training)
            weights, anchors = (
                values[mine].float().to(positions.row.device)
                for values in (choice.loss_weights, choice.anchor_weights)
            )
            for name, value in selection_metrics(table, choice, part).items():
                self._recorder.add(name, value)
        self.numbers.chosen(table.ranks.any(choice.trains))
        out = loss_inputs(positions, scored, weights, anchors)
        if self.args.num_iterations == 1:
            out.pop("sampling_logprobs")  # The student still is the policy that sampled.
        models = self._forward, self.model_wrapped
        out |= self._held.measure(*models, batch, positions, table, choice, mine, signals, step)
        if training and self.accelerator.is_main_process:
            seen = ScoredBatch(
                step=step,
                batch=batch,
                positions=positions,
                signals=signals,
                choice=choice,
                mine=mine,
                tokenizer=self._tokenizer,
            )
            for observer in self.observers:
                observer(seen)
        return out

    # -- loss -------------------------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student, inputs: Batch, num_items_in_batch):
        """Head and loss at the tokens that train; entropy and tokens to log. Inside the wrapper's forward."""
        active = (inputs["loss_weights"] != 0) | (inputs["anchor_weights"] != 0)
        part = trim(inputs, active)
        # A teacher that is asked has no head here: its losses read log-probs of the sampled tokens alone.
        teacher = None if self.teacher_model is None else self._head(self.teacher_model)
        terms = [Term("loss", "teacher", teacher, self._loss_function)]
        terms += self._held.terms(unwrapped_student, inputs)
        head = cache(partial(read_head, unwrapped_student, self.vocab_size))
        losses = partial(
            loss_terms, head, terms=terms, part=part, inputs=inputs, temperature=self.temperature
        )
        exact = partial(self._get_last_hidden_state, unwrapped_student, *part.sequences)
        hidden, when = None, (self.state.global_step, self._step)
        states = partial(self._student_states, unwrapped_student, part, active, exact, losses)
        try:
            hidden = states(when, inputs)
            loss, *anchor = losses(hidden)
        except NumericsError as error:
            hidden = exact() if hidden is None else hidden
            loss, anchor = self.numbers.loss_failed(error, hidden, head()), []
        self._recorder.add("loss/selected_nats", loss.item())
        for term in anchor:
            self._recorder.add("loss/anchor_nats", term.item() / self.args.coef)
            loss = loss + term
        # DDP and FSDP average gradients over ranks; the weights already hold the global denominator.
        loss = loss * self.accelerator.num_processes
        self._loss_value = loss.detach()
        return loss, inputs["entropy"].sum(), inputs["completion_mask"].sum()

    def compute_loss(self, *args, **kwargs):
        return with_value(super().compute_loss(*args, **kwargs), self._loss_value)

    @torch.no_grad()
    def _head(self, model) -> Head:
        return read_head(self.accelerator.unwrap_model(model), self.vocab_size)

    # -- bookkeeping ------------------------------------------------------------------------------

    def _record(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._recorder.timed("perf/train_s"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.numbers.end_of_backward(model, self.state.global_step)
            for name, value in self._recorder.flush().items():
                self._record(name, value)
        return loss

    def prediction_step(self, *args, **kwargs):
        loss, *rest = super().prediction_step(*args, **kwargs)
        self._recorder.flush()
        # Each rank has its part of the batch's loss, times the ranks; the mean is the loss of one process.
        return (self.accelerator.reduce(loss, reduction="mean"), *rest)
