"""Which teacher a prompt has: a column of the dataset names it where there are several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel

from taopd.errors import DataError, suggest
from taopd.models.batch import Positions, teacher_side
from taopd.models.context import context_length
from taopd.models.prompt_faults import LOOKED_AT
from taopd.models.scoring import check_prompt_ids
from taopd.teachers.protocol import room
from taopd.trainer.build.training_set import first_rows


class OneTeacher:
    """A single teacher's answers to what the trainer asks about several: rows need no index."""

    plain: PreTrainedModel | None
    model: Any
    remote: Any = None
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    tokens: int | None = None
    """Ids from this one on are no tokens of the teacher's; None: not known, or renamed by wish."""
    samples: list[list[float]] | None = None
    """Weights of a model here that was loaded for this teacher; see `checkpoint.same_start`."""

    @property
    def plains(self) -> list[PreTrainedModel]:
        """The model as it was loaded, if it runs here."""
        return [] if self.plain is None else [self.plain]

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its completion at most, where that is known."""
        if self.plain is not None:
            return context_length(self.plain)
        return room(self.remote)

    @property
    def models(self) -> list[Any]:
        """The model, prepared for this device; None if it is elsewhere."""
        return [self.model]

    def source(self, name: str) -> Self:
        """This one: it is the only one."""
        return self

    def route(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """What a batch is told of its rows."""
        return {}

    def check_dataset(self, dataset: Any, where: str) -> None:
        """Nothing to look at."""

    def of_positions(self, batch: Mapping[str, Any], positions: Positions) -> None:
        """No index."""

    def check_prompts(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse prompts with a token that the teacher lacks, where its tokens are known."""
        if self.tokens is not None:
            check_prompt_ids(teacher_side(batch), self.tokens)


class TeacherColumn:
    """Reads names as numbers.

    Args:
        column: of the dataset; names: of the teachers, in the order of their numbers.
    """

    def __init__(self, column: str, names: Iterable[str]) -> None:
        self._column, self._place = column, {name: place for place, name in enumerate(names)}

    # A typing slip in one row must be found before hours of training, so every row is read at the start.
    def index_of(self, row: Any, where: str) -> int:
        """Which teacher a row has; a row that names none is refused."""
        name = row.get(self._column) if isinstance(row, Mapping) else None
        if name is None or name == "":
            raise DataError(
                f"{where} names no teacher: give it one of {', '.join(self._place)} in the column "
                f"{self._column!r} (teacher_column)"
            )
        if not isinstance(name, str) or name not in self._place:
            raise DataError(
                f"{where}: no teacher is called {name!r}.{suggest(str(name), self._place)}"
            )
        return self._place[name]

    def check_dataset(self, dataset: Any, where: str) -> list[str]:
        """Look at every row before training (of a stream at the first); the teachers that no row has."""
        column, streams = self._column, isinstance(dataset, IterableDataset)
        rows = first_rows(dataset, LOOKED_AT) if streams else dataset
        if isinstance(dataset, Dataset) and column in dataset.column_names:
            # One column: a row of a table is read with all of them.
            rows = ({column: name} for name in dataset[column])
        used = {self.index_of(row, f"row {number} of {where}") for number, row in enumerate(rows)}
        # What a stream will still bring is not known.
        return [] if streams else [name for name, place in self._place.items() if place not in used]
