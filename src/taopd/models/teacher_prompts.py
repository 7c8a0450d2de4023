"""The teacher's own prompt of a row: a column of the dataset, or a template over its columns.

What: `TeacherPrompts.of` gives the `Prompt` that the teacher reads before the student's completion; None
where it reads the student's. It is rendered like the student's (`prompts.encode_prompts`), with the tools and
template options of the same row.

    column `teacher_prompt`       text or messages, taken as they are
    template                      text with {column} in it; {prompt} is the student's prompt

A template over messages changes the last user turn alone: {prompt} is the text of that turn, the filled
template takes its place, and all other messages stay. Over plain text it is the whole prompt.
"""

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taopd.errors import ConfigError, DataError, nearest
from taopd.models.prompt_rows import (
    Messages,
    Prompt,
    check_text,
    read_content,
    read_prompt,
)

COLUMN = "teacher_prompt"
"""Column with a prompt for the teacher."""
_OWN = "prompt"
"""Name of the student's prompt in a template."""
_SETTING = "teacher_prompt_template"
_SCORES = (
    "the teacher would score the completion as what comes after an answer. Put that answer into a user or "
    "system message"
)


@dataclass(frozen=True, slots=True)
class TeacherPrompts:
    """Where the teacher's prompts come from.

    Args:
        template: None: the column `teacher_prompt`, where a row has it.

    Raises:
        ConfigError: a template that cannot be read, or without {prompt}.
    """

    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and not isinstance(self.template, str):
            raise ConfigError(
                f"{_SETTING}={self.template!r}: must be text with {{{_OWN}}} in it, in quotes in YAML"
            )
        # The question would be missing from what the teacher reads, and nothing else would say so.
        if self.template is not None and _OWN not in [name for _, name in _parts(self.template)]:
            raise ConfigError(
                f"{_SETTING} has no {{{_OWN}}}: the teacher would not see what the student is asked. Put "
                f"{{{_OWN}}} where the student's prompt belongs"
            )

    @property
    def columns(self) -> list[str]:
        """Columns that a row needs beside those of its prompt."""
        if self.template is None:
            return [COLUMN]
        return sorted({name for _, name in _parts(self.template) if name not in (None, _OWN)})

    def used(self, columns: Collection[str]) -> bool:
        """Whether rows with these columns have teacher prompts."""
        return self.template is not None or COLUMN in columns

    def check(self, columns: Collection[str], where: str) -> None:
        """Refuse a dataset that lacks a column.

        Args:
            where: names the dataset, such as "the training set".

        Raises:
            DataError: names the column. ConfigError: both a template and a column.
        """
        # Which of the two was meant cannot be known.
        if self.template is not None and COLUMN in columns:
            raise ConfigError(
                f"{_SETTING} and a column {COLUMN!r} in {where}: one of them is the teacher's prompt; drop "
                "the other"
            )
        missing = [name for name in self.columns if name not in columns]
        if missing:
            named = f"{_SETTING} names" if self.template is not None else "other rows have"
            raise DataError(
                f"{where} has no column {missing[0]!r}, which {named}; it has "
                f"{', '.join(columns)}.{nearest(missing[0], columns)}"
            )

    def of(self, row: Any, prompt: Prompt, where: str) -> Prompt | None:
        """The teacher's prompt of a row; None: the student's.

        Args:
            row: the dataset's columns, or a bare prompt.
            prompt: the student's.
            where: names the row in messages, such as "row 3".

        Raises:
            DataError: a column that is missing, null or empty; a prompt that ends with an assistant message.
        """
        columns = row if isinstance(row, Mapping) else {}
        if self.template is not None:
            return replace(prompt, content=self._filled(columns, prompt.content, where))
        if COLUMN not in columns:
            return None
        # A gap in a column is an oversight more often than a wish.
        if columns[COLUMN] is None:
            raise DataError(
                f"{where} has no {COLUMN}, its column is null: fill it in; where the teacher sees no more "
                "than the student, repeat the prompt"
            )
        what = f"the {COLUMN} of {where}"
        content = read_content(columns[COLUMN], what, where, fault=_SCORES)
        return replace(prompt, content=content)

    def of_rows(self, rows: Sequence[Any], where: str = "row {}") -> list[Prompt] | None:
        """`of` for several rows, the student's prompt where a row has none of its own; None: no row has one.

        Args:
            where: names a row by its number.
        """
        names = [where.format(number) for number in range(len(rows))]
        prompts = [read_prompt(row, name) for row, name in zip(rows, names, strict=True)]
        found = [self.of(*each) for each in zip(rows, prompts, names, strict=True)]
        if all(prompt is None for prompt in found):
            return None
        # One tensor for the batch: a row without a prompt of the teacher's fills its place with its own.
        return [own or prompt for own, prompt in zip(found, prompts, strict=True)]

    def _filled(
        self, columns: Mapping[str, Any], content: str | Messages, where: str
    ) -> str | Messages:
        if isinstance(content, str):
            return self._text(columns, content, where)
        users = [place for place, message in enumerate(content) if message["role"] == "user"]
        if not users:
            raise DataError(
                f"the prompt of {where} has no user turn, which {_SETTING} fills: give the teacher's prompts "
                f"in a column {COLUMN!r}"
            )
        # What comes after it, such as a tool's result, belongs to the same question and stays.
        last = users[-1]
        turn = {**content[last], "content": self._text(columns, content[last]["content"], where)}
        return [*content[:last], turn, *content[last + 1 :]]

    def _text(self, columns: Mapping[str, Any], prompt: str, where: str) -> str:
        assert self.template is not None
        filled = []
        # Piece by piece: a column's text may hold braces of its own.
        for text, name in _parts(self.template):
            filled.append(text)
            if name is not None:
                filled.append(prompt if name == _OWN else _value(columns, name, where))
        return "".join(filled)


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Pieces of text, each with the name in braces after it.

    Raises:
        ConfigError: a brace without its partner, or anything in braces but a name.
    """
    try:
        for text, name, spec, conversion in string.Formatter().parse(template):
            # No attributes, indices or formats: a column's value is put in as it is.
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise ConfigError(
                    f"{_SETTING}: {{{name}}} is no name of a column; braces of the text are written twice, "
                    "{{ and }}"
                )
            yield text, name
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{_SETTING} cannot be read ({error}); braces of the text are written twice, {{{{ and }}}}"
        ) from error


def _value(columns: Mapping[str, Any], name: str, where: str) -> str:
    if name not in columns:
        raise DataError(
            f"{where} has no column {name!r}, which {_SETTING} names.{nearest(name, columns)}"
        )
    value = columns[name]
    # A list would be put in as Python prints it, and cannot be compared with itself where it is an array.
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(
            f"the column {name!r} of {where} is {type(value).__name__}, and {_SETTING} takes text: make a "
            f"column {COLUMN!r} with the teacher's whole prompt"
        )
    # A gap in a column of numbers is often no null but NaN, which would be put in as the word "nan".
    gap = value is None or value != value
    if gap or (isinstance(value, str) and not value.strip()):
        kind = "null" if gap else "empty"
        raise DataError(
            f"the column {name!r} of {where} is {kind}, which {_SETTING} names: fill it in, or drop the row"
        )
    check_text(str(value), f"the column {name!r} of {where}")
    return str(value)
