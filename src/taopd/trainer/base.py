"""What the trainer needs of TRL around its own step: any prompts and batches, forwards in wrappers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler, get_config_model_id

from taopd.errors import DataError
from taopd.kernels import Head
from taopd.models.batch import Trimmed
from taopd.models.forward import backbone_states
from taopd.models.output_head import head_dtype, read_head
from taopd.models.own_forward import Agreement
from taopd.models.prompt_faults import LOOKED_AT
from taopd.models.prompt_rows import COLUMNS, MEDIA, Prompt, read_prompt
from taopd.models.prompts import encode_prompts
from taopd.teachers import Teacher
from taopd.trainer.checkpoint.mixin import AtomicCheckpoints
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import with_value
from taopd.trainer.nonfinite import NonFiniteGuard
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.selection import check_size
from taopd.trainer.step_metrics import Recorder
from taopd.trainer.student import StudentForward
from taopd.trainer.teacher import TeacherSource
from taopd.trainer.training_set import filled, first_rows, warn_of_faults

Batch = dict[str, Any]


class BaseTrainer(AtomicCheckpoints, DistillationTrainer):
    """TRL's trainer with prompts that are repeated, and forwards that leave the head to the caller."""

    args: TeachabilityConfig
    train_dataset: Any
    vocab_size: int
    """Ids that student and teacher share."""
    _recorder: Recorder
    _student: StudentForward
    _teacher: TeacherSource
    nonfinite: NonFiniteGuard
    _loss_value: Tensor
    """Of the last micro-batch, float32."""
    _with_loss_columns: Callable[[Batch], tuple[Batch, ScoredBatch]]
    _rows: Sequence[Prompt] = ()
    """Of the batch that is being sampled."""

    # -- prompts ----------------------------------------------------------------------------------

    def _check_training_set(self) -> None:
        """Enough prompts for a generation batch that can be divided; see `training_set`."""
        args = self.args
        rows: Any = self.train_dataset
        size = self._generation_batch_size()
        args.check_generation_batch(size, streaming=isinstance(rows, IterableDataset))
        check_size(args, size, self.accelerator.num_processes)
        if rows is not None:
            needed = size // args.num_generations
            rows = filled(rows, needed, drop_last=args.dataloader_drop_last)
            some = first_rows(rows, LOOKED_AT)
            warn_of_faults(some, self._tokenizer, stop_ids=self.eos_token_ids, **self._template)
            self.train_dataset = rows
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, rows in sets.items():
            if hasattr(rows, "__len__") and not len(rows):
                raise DataError(f"the evaluation set {name} has no prompts".replace("  ", " "))

    @property
    def _template(self) -> dict[str, Any]:
        """What prompts are rendered with."""
        return {
            "options": self.chat_template_kwargs,
            "tools": self.tools,
            # TRL's own one for tools, where the tokenizer's cannot be continued.
            "template": self.chat_template,
        }

    def _generate_and_score_completions(self, inputs):
        # Read once: TRL hands on the bare prompts, and would drop what else a row says of them.
        self._rows = [read_prompt(row, f"row {n} of the batch") for n, row in enumerate(inputs)]
        kinds = {type(prompt.content) for prompt in self._rows}
        if self.tools and (len(kinds) > 1 or any(prompt.tools for prompt in self._rows)):
            raise DataError(
                "tools of the trainer go with messages alone, in rows without tools of their own: drop the "
                "tools column, or the trainer's tools"
            )
        bare = [{"prompt": prompt.content} for prompt in self._rows]
        return super()._generate_and_score_completions(bare)

    def _tokenize_prompts(self, prompts):
        known = [prompt.content for prompt in self._rows] == prompts
        return self._encode(self._rows if known else prompts), None, {}

    def _encode(self, rows: Sequence[Any]) -> list[list[int]]:
        template = dict(self._template)
        options = template.pop("options")
        return encode_prompts(self._tokenizer, rows, chat_template_kwargs=options, **template)

    def _set_signature_columns_if_needed(self):
        # What `remove_unused_columns` leaves.
        self._signature_columns = [*COLUMNS, *MEDIA, "answer"]

    # -- sampling ---------------------------------------------------------------------------------

    def _generation_batch_size(self) -> int:
        args = self.args
        local = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return local * self.accelerator.num_processes

    def sample(
        self, rows: Sequence[Any], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of prompts and of one completion each, from the sampler that trains; no batch comes of them.

        Args:
            rows: see `encode_prompts`.
        """
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
        # The student that scoring sees draws the tokens; TRL leaves its dropout on.
        training = self.model.training
        self.model.eval()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train(training)

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; `processing_class` may be a processor around it."""
        return self._tokenizer

    @property
    def remote_teacher(self) -> Teacher | None:
        """The teacher, if it is behind a server or a `Teacher` of the caller's."""
        return self._teacher.remote

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
        return self._run_inside(wrapped, self._get_last_hidden_state, part)

    def _forward_keeping_prefix(self, wrapped, part: Trimmed) -> tuple[Tensor, Head]:
        """`forward_states` of the student that leaves its keys and values for the sparse forward."""
        return self._run_inside(wrapped, self._student.scoring_states, part)

    def _run_inside(self, wrapped, backbone, part: Trimmed) -> tuple[Tensor, Head]:
        model = self.accelerator.unwrap_model(wrapped)
        sequences = part.input_ids, part.attention_mask, part.num_completion
        run = self._states_and_head, backbone, model
        return self._forward_redirection(wrapped, model, *run, *sequences)

    def _states_and_head(self, backbone, model, *sequences) -> tuple[Tensor, Head]:
        hidden = backbone(model, *sequences)
        return hidden, read_head(model, self.vocab_size)

    @torch.no_grad()
    def compare_with_own_forward(self, batch: Mapping[str, Tensor]) -> dict[str, Agreement]:
        """The scoring path of each model in this process against its own forward, on a few rows."""
        return self._teacher.compare(self.forward_states, self.model_wrapped, batch)

    @torch.no_grad()
    def _head(self, model) -> Head:
        return read_head(self.accelerator.unwrap_model(model), self.vocab_size)

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
            for name, value in self._recorder.flush().items():
                self.record(name, value)
        return loss

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        # Whatever kept the batches away, what would be saved now is not a distilled student.
        if self.state.global_step == 0:
            raise DataError(
                "training ended without a step: the training set gave no generation batch"
            )
        return result

    # -- bookkeeping ------------------------------------------------------------------------------

    def record(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def prediction_step(self, *args, **kwargs):
        loss, *rest = super().prediction_step(*args, **kwargs)
        # An evaluation's figures must not be added to those of the next training step.
        self._recorder.flush()
        # Each rank has its part of the batch's loss, times the ranks; the mean is the loss of one process.
        return (self.accelerator.reduce(loss, reduction="mean"), *rest)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or not path.is_file():
            return
        # TRL names hub ids alone, and writes None for a folder. Its name is enough: a path is private.
        name = Path(get_config_model_id(self.model.config) or "").name
        card = path.read_text(encoding="utf-8")
        base = f"`{name}`" if name else "a model without a name"
        unnamed = "[None](https://huggingface.co/None)"
        path.write_text(card.replace(unnamed, base), encoding="utf-8")
