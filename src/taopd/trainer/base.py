"""What the trainer needs of TRL around its own step: any batches, sampling, forwards in wrappers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler

from taopd.errors import ConfigError, TaopdError
from taopd.kernels import Head
from taopd.models.batch import Trimmed
from taopd.models.forward import backbone_states, without_checkpointing
from taopd.models.output_head import head_dtype, read_head
from taopd.trainer.build.own_teacher import AdapterTeacher
from taopd.trainer.checkpoint.mixin import AtomicCheckpoints
from taopd.trainer.loss import with_value
from taopd.trainer.nonfinite import NonFiniteGuard
from taopd.trainer.prompting import PromptTrainer
from taopd.trainer.run_record import RecordedRuns
from taopd.trainer.sampler_monitor import SamplerMonitor
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.settings.config_checks import check_generation_batch
from taopd.trainer.settings.number_checks import OF_WORKERS, about
from taopd.trainer.step_metrics import Recorder, over_processes
from taopd.trainer.student import StudentForward
from taopd.trainer.teacher import TeacherSource
from taopd.trainer.teacher_routes import TeacherRoutes

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class BaseTrainer(RecordedRuns, AtomicCheckpoints, PromptTrainer):
    """TRL's trainer with prompts that are repeated, and forwards that leave the head to the caller."""

    trains = True
    """Steps will follow; not in a trainer that is made to be looked at."""
    vocab_size: int
    """Ids that student and teacher share."""
    _recorder: Recorder
    _student: StudentForward
    _teacher: TeacherSource | TeacherRoutes
    nonfinite: NonFiniteGuard
    sampler_monitor: SamplerMonitor
    _loss_value: Tensor
    """Of the last micro-batch, float32."""
    _with_loss_columns: Callable[[Batch], tuple[Batch, ScoredBatch]]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO:
            # TRL's step goes past the compiled forward too. The wrapper is not free: parameters have other
            # names behind it, and an adapter is not found.
            logger.warning(
                "torch_compile has no effect: the step calls backbone and head by themselves"
            )
            plugin.backend = DynamoBackend.NO
        if self.args.fp16 and self.args.device.type == "cpu":
            logger.warning(
                "fp16=True has no effect on the CPU: take bf16=True for 16-bit arithmetic"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with about(self.args, "optim", "optim_args", "optim_target_modules"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with about(self.args, "lr_scheduler_type", "lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        settings = self.args
        known = not settings.auto_find_batch_size or batch_size == settings.train_batch_size
        if batch_size is not None and not known:
            # After want of memory. Sampler, scoring and loss read the setting, the data loader does not:
            # prompts would be left out, others taken twice.
            settings.per_device_train_batch_size = batch_size // max(1, settings.n_gpu)
            streaming = isinstance(self.train_dataset, IterableDataset)
            check_generation_batch(settings, self._generation_batch_size(), streaming=streaming)
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    # -- sampling ---------------------------------------------------------------------------------

    def sample(
        self, rows: Sequence[Any], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of prompts and of one completion each, from the sampler that trains; no batch comes of them."""
        prompt_ids = self._encode(rows)
        if self.use_vllm:
            limits, name = self.vllm_generation, "max_completion_length"
        else:
            limits, name = self.generation_config, "max_new_tokens"
        # The limit is the sampler's own object, which the run goes on with.
        usual = getattr(limits, name)
        setattr(limits, name, max_new_tokens)
        try:
            completion_ids = self._generate_single_turn(prompt_ids, None, {})
        finally:
            setattr(limits, name, usual)
        # The note of empty completions belongs to a batch that trains.
        self.nonfinite.forget()
        return prompt_ids, completion_ids

    def _generate_single_turn(self, *args, **kwargs) -> list[list[int]]:
        # The student that scoring sees draws the tokens; TRL leaves its dropout on. TRL would also switch
        # checkpointing on again by other keywords than at the start, each time with a hook more.
        training = self.model.training
        self.model.eval()
        try:
            with without_checkpointing(self.model), self.sampler_monitor.listening():
                completions = super()._generate_single_turn(*args, **kwargs)
        except TaopdError:
            raise
        except (ArithmeticError, TypeError, ValueError) as error:
            if given := self.args.generation_kwargs:
                raise ConfigError(f"generation_kwargs={given}: sampling failed: {error}") from error
            raise
        finally:
            self.model.train(training)
        self.nonfinite.sampled(completions)
        # TRL reads every completion's last token; where nothing was sampled nothing will train either.
        return [ids or [self._tokenizer.eos_token_id] for ids in completions]

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; `processing_class` may be a processor around it."""
        return self._tokenizer

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Of several teachers; one has none."""
        return self._teacher.names

    def teacher_source(self, name: str = "") -> TeacherSource:
        """The teacher of this name among several, or the only one."""
        return self._teacher.source(name)

    def _get_train_sampler(self, dataset=None):
        args = self.args
        sampler = RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=self._generation_batch_size() // args.num_generations,
            # TRL fetches a batch per micro-batch and uses the first of a generation batch for all of them.
            repeat_count=args.gradient_accumulation_steps * args.num_iterations,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )
        if dataset is None or dataset is self.train_dataset:
            self._sampler = sampler
        return sampler

    def _get_dataloader(self, *args, **kwargs):
        # torch refuses them otherwise. TRL reads a stream without workers, whatever is set.
        with _settings_of_workers(self.args):
            return super()._get_dataloader(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        accumulation = self.args.gradient_accumulation_steps
        iteration = (self._step // accumulation) % self.args.num_iterations
        # The second optimizer step on a generation batch reads what the first has left.
        if self.model.training and iteration > 0 and self._buffered_inputs is not None:
            return self._buffered_inputs[self._step % accumulation]
        return super()._prepare_inputs(generation_batch)

    # -- forwards ---------------------------------------------------------------------------------

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep):
        # The backbone is called past the wrapper's forward, where accelerate put the autocast: without this
        # line bf16=True would train in float32. The head gets the dtype it would have had there. TRL passes
        # no positions, so that GPT-2 would count the padding, in training and not in sampling.
        with self.accelerator.autocast():
            sequences = input_ids, attention_mask, logits_to_keep
            return head_dtype(backbone_states(unwrapped_model, *sequences))

    def forward_states(self, wrapped, part: Trimmed) -> tuple[Tensor, Head]:
        """Backbone and head of a model, inside its DDP or FSDP wrapper."""
        if isinstance(wrapped, AdapterTeacher):
            with wrapped.weights() as model:
                hidden = self._run_inside(model, self._get_last_hidden_state, part)[0]
            return hidden, wrapped.head(self._head)
        return self._run_inside(wrapped, self._get_last_hidden_state, part)

    def _forward_keeping_prefix(self, wrapped, part: Trimmed) -> tuple[Tensor, Head]:
        """`forward_states` of the student that leaves its keys and values for the sparse forward."""
        return self._run_inside(wrapped, self._student.scoring_states, part)

    def _run_inside(self, wrapped, backbone, part: Trimmed) -> tuple[Tensor, Head]:
        model = self.accelerator.unwrap_model(wrapped)
        run = self._states_and_head, backbone, model
        return self._forward_redirection(wrapped, model, *run, *part.sequences)

    def _states_and_head(self, backbone, model, *sequences) -> tuple[Tensor, Head]:
        hidden = backbone(model, *sequences)
        return hidden, read_head(model, self.vocab_size)

    @torch.no_grad()
    def _head(self, model) -> Head:
        if isinstance(model, AdapterTeacher):
            return model.head(self._head)
        return read_head(self.accelerator.unwrap_model(model), self.vocab_size)

    def _teacher_heads(self) -> list[Head | None]:
        # A teacher behind a server has no head here: its losses read log-probs of sampled tokens alone.
        return [None if model is None else self._head(model) for model in self._teacher.models]

    # -- the loss ---------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        foreign = "loss_weights" not in inputs
        if foreign:
            inputs = self._complete(inputs, num_items_in_batch)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if foreign:
            # No step of the run made this batch: neither its figures nor its states belong to one.
            self._recorder.flush()
            self._student.forget()
        return with_value(loss, self._loss_value)

    def _complete(self, inputs: Batch, num_items_in_batch: Any) -> Batch:
        """A batch that TRL or a caller made, scored and selected by itself; normalized as TRL does."""
        batch = self._with_loss_columns(dict(inputs))[0]
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            # TRL's count is of all processes, whose gradients are averaged afterwards.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1)
        elif num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * self.accelerator.num_processes
        if num_items_in_batch is None:
            return batch
        mask = inputs["completion_mask"]
        # Our weights make a mean over this batch: here it is a part of a larger one.
        count = self.accelerator.reduce((mask * inputs.get("tool_mask", mask)).sum())
        scale = (count / num_items_in_batch).to(mask.device)
        scaled = {name: batch[name] * scale for name in ("loss_weights", "anchor_weights")}
        return batch | scaled

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._recorder.timed("perf/train_s"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        # The last micro-batch of a step: all gradients are there, and none is clipped yet.
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.nonfinite.end_of_backward(model, self.state.global_step)
            values = over_processes(self.accelerator, self._recorder.flush())
            for name, value in values.items():
                self.record(name, value)
        return loss

    # -- bookkeeping ------------------------------------------------------------------------------

    def record(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def evaluation_loop(self, *args, **kwargs):
        # Outside of training bf16_full_eval and fp16_full_eval cast the student itself, for good.
        with _same_weights(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        loss, *rest = super().prediction_step(*args, **kwargs)
        # An evaluation's figures must not be added to those of the next training step.
        self._recorder.flush()
        # Each rank has its part of the batch's loss, times the ranks; the mean is the loss of one process.
        return (self.accelerator.reduce(loss, reduction="mean"), *rest)


@contextmanager
def _settings_of_workers(args: Any) -> Iterator[None]:
    """Leave out the settings of worker processes where there are none."""
    given = {name: getattr(args, name) for name in OF_WORKERS if hasattr(args, name)}
    vars(args).update(
        {} if args.dataloader_num_workers else {name: OF_WORKERS[name] for name in given}
    )
    try:
        yield
    finally:
        vars(args).update(given)


@contextmanager
def _same_weights(model: nn.Module) -> Iterator[None]:
    """Give a model that is cast meanwhile its weights and buffers back, as they were."""
    weights = [(each, each.data) for each in model.parameters()]
    buffers = [
        (module, name, values)
        for module in model.modules()
        for name, values in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, values in weights:
            if parameter.dtype != values.dtype:
                parameter.data = values.to(parameter.device)
        for module, name, values in buffers:
            if (now := getattr(module, name)).dtype != values.dtype:
                setattr(module, name, values.to(now.device))
