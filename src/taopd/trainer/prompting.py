"""What the trainer needs of TRL before it samples: any prompts, and the teacher's own beside them."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import IterableDataset
from trl import DistillationTrainer

from taopd.errors import ConfigError, DataError
from taopd.models.batch import teacher_columns
from taopd.models.context import context_length
from taopd.models.prompt_faults import LOOKED_AT
from taopd.models.prompt_lengths import check_prompt_lengths
from taopd.models.prompt_rows import COLUMNS, MEDIA, Prompt, read_prompt
from taopd.models.prompts import encode_prompts
from taopd.models.teacher_prompts import COLUMN, TeacherPrompts
from taopd.trainer.build.tools import check_rows
from taopd.trainer.build.training_set import (
    check_teacher_prompts,
    columns_of,
    evaluation_sets,
    filled,
    first_rows,
    require_rows,
    warn_of_faults,
)
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import check_size
from taopd.trainer.settings.config_checks import check_generation_batch


class PromptTrainer(DistillationTrainer):
    """TRL's trainer with prompts of any form, encoded row by row, for the student and for the teacher."""

    args: TeachabilityConfig
    train_dataset: Any
    _teacher: Any
    _unrepeated: Any = None
    """The training set before prompts were repeated to fill a generation batch."""
    _rows: Sequence[Prompt] = ()
    """Of the batch that is being sampled."""

    def _check_training_set(self) -> None:
        """Enough prompts for a generation batch that can be divided; see `training_set`."""
        args = self.args
        rows: Any = self.train_dataset
        evaluation = evaluation_sets(self.eval_dataset)
        size = self._generation_batch_size()
        check_generation_batch(args, size, streaming=isinstance(rows, IterableDataset))
        check_size(args, size, self.accelerator.num_processes)
        for where, others in evaluation.items():
            require_rows(others, where)
        if rows is not None:
            require_rows(rows, "the training set")
            self._unrepeated = rows
            needed = size // args.num_generations
            rows = filled(rows, needed, drop_last=args.dataloader_drop_last)
            some = first_rows(rows, LOOKED_AT)
            check_rows(some, args)
            warn_of_faults(some, self._tokenizer, stop_ids=self.eos_token_ids, **self._template)
            self.train_dataset = rows
            sets = self._teacher_prompts, rows, evaluation, self._tokenizer
            named = args.teacher_model_name_or_path
            check_teacher_prompts(*sets, named, stop_ids=self.eos_token_ids, **self._template)
        if args.accelerator_config.dispatch_batches:
            raise ConfigError(
                "accelerator_config: dispatch_batches=True sends batches of tensors to the other processes, "
                "and prompts are text: leave it out"
            )
        if "inputs" in (args.include_for_metrics or ()):
            raise ConfigError(
                "include_for_metrics: inputs are for a metric of your own, which this trainer does not take: "
                "leave it out"
            )
        if args.eval_on_start and self.eval_dataset is None:
            raise ConfigError(
                "eval_on_start=True evaluates before the first step: pass eval_dataset"
            )

    def _check_routes(self) -> None:
        """Every row has a teacher that there is."""
        for where, rows in self._sets():
            self._teacher.check_dataset(rows, where)

    def _check_lengths(self) -> None:
        """Every row has what both models read, and with its completion fits the contexts of both."""
        args, teacher, others = self.args, self._teacher, self._teacher_prompts
        own = context_length(self.accelerator.unwrap_model(self.model))
        theirs = {name: teacher.source(name).context_length for name in teacher.names or ("",)}

        def of_teacher(row: Any) -> int | None:
            return theirs[row[args.teacher_column] if teacher.names else ""]

        def of_both(row: Any) -> int | None:
            return min((each for each in (own, of_teacher(row)) if each), default=None)

        for where, rows in self._sets():
            # Of a stream the beginning. One prompt too long, or a gap in what the teacher reads, would end
            # the run at a step that nobody can foresee.
            if isinstance(rows, IterableDataset):
                rows = first_rows(rows, LOOKED_AT)
            reads = others.used(columns_of(rows))
            # The teacher reads its own prompts in place of the student's.
            looks: list[tuple[Any, Any]] = [(None, own if reads else of_both)]
            for prompts, limit in looks + [(others, of_teacher)] * reads:
                check_prompt_lengths(
                    rows,
                    self._tokenizer,
                    context_length=limit,
                    max_completion_length=args.max_completion_length,
                    teacher_prompts=prompts,
                    also=[args.teacher_column] if teacher.names else [],
                    where=where,
                    **self._template,
                )

    def _sets(self) -> Iterator[tuple[str, Any]]:
        """The sets of prompts that there are, each after its name."""
        if self._unrepeated is not None:
            yield "the training set", self._unrepeated
        yield from evaluation_sets(self.eval_dataset).items()

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
        teachers = self.encode_for_teacher(inputs, "row {} of the batch")
        batch = super()._generate_and_score_completions(bare)
        pad_id = self._tokenizer.pad_token_id
        return batch | teacher_columns(teachers, pad_id, batch["prompt_ids"].device)

    def _tokenize_prompts(self, prompts):
        known = [prompt.content for prompt in self._rows] == prompts
        return self._encode(self._rows if known else prompts), None, {}

    def _encode(self, rows: Sequence[Any]) -> list[list[int]]:
        return encode_prompts(self._tokenizer, rows, **self._template)

    @property
    def _teacher_prompts(self) -> TeacherPrompts:
        return TeacherPrompts(self.args.teacher_prompt_template)

    @property
    def teacher_prompt_columns(self) -> list[str]:
        """Columns that the teacher's own prompts are made of, where rows have such prompts."""
        return self._teacher_prompts.columns

    def encode_for_teacher(
        self, rows: Sequence[Any], where: str = "row {}"
    ) -> list[list[int]] | None:
        """Ids of the teacher's own prompts; None: it reads the student's."""
        found = self._teacher_prompts.of_rows(rows, where)
        return None if found is None else self._encode(found)

    def _set_signature_columns_if_needed(self):
        # What `remove_unused_columns` leaves.
        own = {COLUMN, self.args.teacher_column, *self._teacher_prompts.columns}
        self._signature_columns = [*COLUMNS, *MEDIA, "answer", *sorted(own - {"answer"})]

    def _generation_batch_size(self) -> int:
        args = self.args
        local = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return local * self.accelerator.num_processes
