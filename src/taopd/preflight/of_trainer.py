"""The check of a trainer that was made in Python: `taopd.check(trainer)`, `trainer.check()`.

The items are those of `taopd check`. Models, tokenizer, prompts and settings are the trainer's own; of the
teacher only its tokenizer's files are read, where the model says what they are.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from taopd.preflight.items import verdicts
from taopd.preflight.subject import MOST_PROMPTS, Subject, Unnamed, rows_with
from taopd.preflight.teacher_error import kind_of
from taopd.preflight.verdict import Verdicts
from taopd.trainer.build.from_settings import Inputs
from taopd.trainer.build.own_teacher import AdapterTeacher
from taopd.trainer.build.training_set import first_rows
from taopd.trainer.settings_file import TrainSettings


def check(trainer: Any, *, max_tokens: int | None = None) -> Verdicts:
    """Look for what most often breaks a distillation run; nothing is trained, nothing is written.

    Args:
        trainer: a `TeachabilityTrainer` that has not begun to train.
        max_tokens: cut the completions of the sampled micro-batch here; None: at `max_completion_length`.

    Returns:
        One verdict per item: pass, warn or fail, the measured figure, and what to do. `print` shows a line
        for each.
    """
    return Verdicts(verdicts(TrainerSubject(trainer, max_tokens)))


class Rows(list[Any]):
    """Prompts of a data set that cannot be indexed as `datasets.Dataset` can: its first ones."""

    @property
    def column_names(self) -> list[str]:
        """Of the first row."""
        return list(self[0]) if self else []

    def select(self, numbers: Sequence[int]) -> "Rows":
        """The rows with these numbers."""
        return Rows(self[number] for number in numbers)

    def __getitem__(self, key: Any) -> Any:
        return [row.get(key) for row in self] if isinstance(key, str) else super().__getitem__(key)


class TrainerSubject(Subject):
    """What is checked, of a trainer that is there already."""

    def __init__(self, trainer: Any, max_tokens: int | None, teacher: str = "") -> None:
        whole = bool(trainer.teacher_names) and not teacher
        source = None if whole else trainer.teacher_source(teacher)
        args = trainer.args if source is None else source.args
        settings = TrainSettings.of_python(args)
        super().__init__(settings=settings, max_tokens=max_tokens, teacher=teacher, thorough=False)
        self.source = source
        """None: of several teachers all, which only the item "memory" looks at together."""
        # In place of what the cached properties would make.
        self.trainer = trainer
        self.tokenizer = trainer.text_tokenizer
        self.inputs = Inputs(
            student=trainer.accelerator.unwrap_model(trainer.model),
            teacher=None if source is None else source.plain,
            tokenizer=trainer.text_tokenizer,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
        )

    @cached_property
    def prompts(self) -> Any:
        """The training set, or the first rows of one that is no `datasets.Dataset`."""
        rows = self.trainer.train_dataset
        rows = rows if hasattr(rows, "select") else Rows(first_rows(rows, MOST_PROMPTS))
        if not self.teacher:
            return rows
        return rows_with(rows, self.trainer.args.teacher_column, self.teacher)

    @cached_property
    def parts(self) -> dict[str, Subject]:
        """Of each of several teachers, by name."""
        parts: dict[str, Subject] = {
            name: TrainerSubject(self.trainer, self.max_tokens, name)
            for name in self.trainer.teacher_names
        }
        return parts or {"": self}

    @property
    def packing(self) -> str | None:
        # A path that was given to the trainer stands in no setting.
        config = getattr(self.inputs.teacher, "config", None)
        return kind_of(self.settings, getattr(config, "name_or_path", None))

    @cached_property
    def tools(self) -> Sequence[Any]:
        """Those of the trainer: an argument of it, or the setting."""
        return self.trainer.tools or ()

    @property
    def own_teacher(self) -> bool:
        # The word may be an argument of the trainer. A copy is a teacher with files like any other.
        return super().own_teacher or isinstance(
            getattr(self.source, "model", None), AdapterTeacher
        )

    @property
    def teacher_name(self) -> str:
        """Where the teacher's files are."""
        named = self.settings.training.teacher_model_name_or_path
        if self.own_teacher:
            named = getattr(self.inputs.student, "name_or_path", None)
        named = named or getattr(self.inputs.teacher, "name_or_path", None)
        if not named:
            raise Unnamed(
                "It is not known where the teacher's files are, so its tokenizer is not compared: set "
                "teacher_model_name_or_path in the config (no weights are read from it)."
            )
        return str(named)

    @property
    def remote(self) -> bool:
        return self.source is not None and self.source.remote is not None

    @property
    def served(self) -> bool:
        # A `Teacher` of the caller's own has no tokenizer to ask, and no limit of context.
        return hasattr(getattr(self.source, "remote", None), "tokenize")
