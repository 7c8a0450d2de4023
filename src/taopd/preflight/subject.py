"""What `taopd check` looks at: settings, tokenizers, models and a micro-batch, each made on first use."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from taopd.models import prompts as data
from taopd.models.loading import load_config, load_generation_config
from taopd.models.output_head import head_rows
from taopd.models.teacher_prompts import TeacherPrompts
from taopd.preflight.measure import Measured
from taopd.preflight.probe import measure_micro_batch
from taopd.preflight.teacher_error import kind_of
from taopd.runs.limits import MOST_PROMPTS
from taopd.teachers.local import tokenizer_loaded_with
from taopd.trainer.build import from_settings as build
from taopd.trainer.build.looked_at import LookedAt
from taopd.trainer.build.teacher_connection import connect_teacher
from taopd.trainer.build.tools import load_tools
from taopd.trainer.settings.teacher_names import OWN_TEACHERS
from taopd.trainer.settings_file import TrainSettings

_PARTS = {
    "inputs": "both models",
    "trainer": "a trainer with these settings",
    "measured": "a sampled micro-batch",
}


class Missing(Exception):
    """Something that an earlier item has already reported; its cause is what that item raised."""


class Unnamed(Exception):
    """The files of a teacher behind a server, where no setting names them."""


@dataclass(kw_only=True)
class Subject:
    """What is checked; every part is made on first use."""

    settings: TrainSettings
    teacher: str = ""
    """Of several, the one that is looked at."""
    thorough: bool = True
    """Also what needs the weights of a teacher that is behind a server."""
    max_tokens: int | None = None
    """Completions of the micro-batch are cut here; None: at `max_completion_length`."""

    @cached_property
    def tokenizer(self) -> Any:
        """The student's."""
        if (inputs := self._loaded) is not None:
            return inputs.tokenizer
        model = self.settings.model
        return data.load_tokenizer(str(model.model_name_or_path), revision=model.model_revision)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """Of student and teacher."""
        if self.own_teacher:
            return self.tokenizer, self.tokenizer
        inputs = self._loaded
        if inputs is not None and (own := tokenizer_loaded_with(inputs.teacher)) is not None:
            return self.tokenizer, own
        name, revision = self.teacher_name, self.teacher_revision
        return self.tokenizer, data.load_tokenizer(name, revision=revision)

    @property
    def teacher_name(self) -> str:
        """Where the teacher's files are; a teacher behind a server may have none."""
        if self.own_teacher:
            return str(self.settings.model.model_name_or_path)
        name = self.settings.training.teacher_model_name_or_path
        if name is None:
            raise Unnamed(
                "The teacher's files are not named: set teacher_model_name_or_path beside teacher_url. Its "
                "tokenizer and config are read, no weights."
            )
        return str(name)

    @property
    def teacher_revision(self) -> str:
        """Of these files."""
        model, training = self.settings.model, self.settings.training
        return (
            model.model_revision if self.own_teacher else training.teacher_model_revision or "main"
        )

    @cached_property
    def server(self) -> Any:
        """The teacher behind `teacher_url`."""
        if self.has("trainer"):
            return self.trainer.teacher_source(self.teacher).remote
        # Where no trainer can be made, a connection of our own.
        return connect_teacher(self.settings.training, head_rows(self.student_config))

    @cached_property
    def prompts(self) -> Any:
        """The training set."""
        if (inputs := self._loaded) is not None:
            return inputs.train_dataset
        return build.load_training_set(self.settings)

    @cached_property
    def student_config(self) -> Any:
        """Of the model if it loads, else from the files: a mismatch must not hide the next one."""
        return self._read("student", "config")

    @cached_property
    def configs(self) -> tuple[Any, Any]:
        """Of student and teacher, likewise."""
        return self.student_config, self._read("teacher", "config")

    @cached_property
    def known_configs(self) -> dict[str, Any]:
        """By whose they are; the teacher's where it is in this process, or its files are named."""
        here = self._loaded is not None and self._loaded.teacher is not None
        both = self.configs if here or self.names_teacher else (self.student_config,)
        return dict(zip(("student", "teacher"), both, strict=False))

    @cached_property
    def generation_configs(self) -> tuple[Any, Any]:
        """Likewise."""
        teacher = self._read("teacher", "generation_config")
        return self.student_generation_config, teacher

    @cached_property
    def student_generation_config(self) -> Any:
        """Of the student alone."""
        return self._read("student", "generation_config")

    @cached_property
    def inputs(self) -> Any:
        """Models, tokenizer and data, as `taopd train` loads them."""
        return build.load_inputs(self.settings, self.__dict__.get("prompts"))

    @cached_property
    def trainer(self) -> Any:
        """A trainer that never trains."""
        self.need("inputs")
        return build.make_trainer(self.settings, self.inputs, kind=LookedAt)

    @cached_property
    def measured(self) -> Measured:
        """One scored micro-batch."""
        # Before the trainer: a teacher without prompts has nothing to be measured on.
        rows = self.prompts if self.teacher else None
        self.need("trainer")
        return measure_micro_batch(
            self.trainer,
            teacher=self.teacher,
            rows=rows,
            max_tokens=self.max_tokens,
            compare=self.packing,
        )

    @property
    def packing(self) -> str | None:
        """What is done to the teacher; see `teacher_error.kind_of`."""
        return kind_of(self.settings)

    @cached_property
    def parts(self) -> "dict[str, Subject]":
        """What is looked at for each of several teachers, by name; with one teacher this, as ""."""
        several = self.settings.of_each_teacher()
        if list(several) == [""]:
            return {"": self}
        common: dict[str, Any] = {"max_tokens": self.max_tokens, "thorough": self.thorough}
        return {
            name: OneOfSeveral(settings=settings, teacher=name, whole=self, **common)
            for name, settings in several.items()
        }

    def has(self, name: str) -> bool:
        """Whether a part can be made; tried once, and the error is kept for the first item in need of it."""
        if name not in self._errors:
            try:
                getattr(self, name)
            except Exception as error:
                self._errors[name] = error
        return name not in self._errors

    def need(self, name: str) -> None:
        """Make a part, or raise what prevents it: the error to the first who asks, `Missing` afterwards."""
        if not self.has(name):
            error = self._errors[name]
            self._errors[name] = Missing(f"Needs {_PARTS[name]}: see above.")
            self._errors[name].__cause__ = error.__cause__ if isinstance(error, Missing) else error
            raise error

    @property
    def _loaded(self) -> Any | None:
        """`inputs` where they are there already: a plan reads tokenizers and no weights."""
        return self.__dict__.get("inputs")

    @cached_property
    def _errors(self) -> dict[str, Exception]:
        return {}

    def _read(self, owner: str, attribute: str) -> Any:
        model = getattr(self.inputs, owner) if self.has("inputs") else None
        if model is not None:
            return getattr(model, attribute)
        read = load_config if attribute == "config" else load_generation_config
        if owner == "student":
            model = self.settings.model
            return read(str(model.model_name_or_path), revision=model.model_revision)
        return read(self.teacher_name, revision=self.teacher_revision)

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens, of at most `MOST_PROMPTS` prompts."""
        return self._longest(self.some_rows(MOST_PROMPTS))

    @cached_property
    def longest_teacher_prompt(self) -> int:
        """Likewise, of what the teacher reads."""
        if not self.has_teacher_prompts:
            return self.longest_prompt
        return self._longest(self.teacher_prompts.of_rows(self.some_rows(MOST_PROMPTS)) or [])

    def _longest(self, rows: list[Any]) -> int:
        return max(map(len, data.encode_prompts(self.tokenizer, rows, **self.shown)))

    @property
    def teacher_prompts(self) -> TeacherPrompts:
        """Where the teacher's prompts come from."""
        return TeacherPrompts(self.settings.training.teacher_prompt_template)

    @property
    def has_teacher_prompts(self) -> bool:
        """The teacher reads prompts of its own."""
        return self.teacher_prompts.used(self.prompts.column_names)

    @property
    def own_teacher(self) -> bool:
        """The student is its own teacher."""
        return self.settings.training.teacher_model_name_or_path in OWN_TEACHERS

    def some_rows(self, count: int) -> list[Any]:
        """About so many rows of the training set, evenly spread."""
        step = max(1, len(self.prompts) // count)
        return list(self.prompts.select(range(0, len(self.prompts), step)))

    @cached_property
    def tools(self) -> Sequence[Any]:
        """Functions that the template shows in every prompt."""
        path = self.settings.training.tools
        return load_tools(path) if path else ()

    @property
    def shown(self) -> dict[str, Any]:
        """What every prompt is rendered with."""
        options = dict(self.settings.training.chat_template_kwargs or {})
        return {"options": options, "tools": self.tools}

    @property
    def remote(self) -> bool:
        """The teacher is behind a server."""
        return self.settings.training.teacher_url is not None

    @property
    def names_teacher(self) -> bool:
        """It is known where the teacher's files are."""
        try:
            return bool(self.teacher_name)
        except Unnamed:
            return False

    @property
    def served(self) -> bool:
        """There is a server to ask about itself."""
        return self.remote


def rows_with(rows: Any, column: str, teacher: str) -> Any:
    """The prompts of one of several teachers.

    Raises:
        Unnamed: there are none.
    """
    names = rows[column] if column in rows.column_names else []
    own = [place for place, name in enumerate(names) if name == teacher]
    if not own:
        raise Unnamed(
            f"No prompt of the training set has {teacher!r} in the column {column!r}: drop this teacher, or "
            "name it where it should teach."
        )
    return rows.select(own)


@dataclass(kw_only=True)
class OneOfSeveral(Subject):
    """One teacher of a run with several; what is loaded is loaded once, by the whole."""

    whole: Subject

    @cached_property
    def tokenizer(self) -> Any:
        return self.whole.tokenizer

    @cached_property
    def prompts(self) -> Any:
        """Those of this teacher."""
        return rows_with(self.whole.prompts, self.settings.training.teacher_column, self.teacher)

    @cached_property
    def inputs(self) -> Any:
        self.whole.need("inputs")
        inputs = self.whole.inputs
        teacher = inputs.teacher[self.teacher]
        # One behind a server is an entry of the settings there.
        return replace(inputs, teacher=None if isinstance(teacher, dict) else teacher)

    @cached_property
    def trainer(self) -> Any:
        self.whole.need("trainer")
        return self.whole.trainer
