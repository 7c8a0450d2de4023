"""Several teachers: each completion is scored by its own, and all are selected from together.

The student runs once over the whole generation batch. Every teacher then scores the positions of its own
completions, micro-batch by micro-batch of the whole batch, so that all processes run the same forwards of a
sharded teacher. The scores are merged in the order of the batch.

One normalization sees one kind of C: where a teacher gives a lower bound, that of all others is reduced to
theirs too, for the whole generation batch.

Not here: one teacher (`teacher.TeacherSource`), the terms of the loss (`loss.distillation_terms`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.errors import ConfigError, DataError, NumericsError
from taopd.models.batch import Forward, Positions, used_rows
from taopd.models.own_forward import Agreement
from taopd.models.scoring import Given, Reuse, Scored
from taopd.runs.jsonl import write_json
from taopd.signals import TokenSignals, concatenate, taken
from taopd.teachers import as_bound
from taopd.trainer.build.loaded_teacher import LoadedTeachers
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.teacher_entries import (
    ALONE,
    check_teachers,
    entry_of,
    naming,
    settings_of,
)
from taopd.trainer.teacher import FILE, TeacherSource
from taopd.trainer.teacher_column import TeacherColumn
from taopd.trainer.watches.teacher_watch import TeacherWatch, TeacherWatches

logger = logging.getLogger(__name__)
INDEX = "teacher_index"
"""In a batch: which teacher each completion has, int64 [B]."""


def teachers_of(
    teacher: Any,
    args: TeachabilityConfig,
    student: PreTrainedModel,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
) -> "TeacherSource | TeacherRoutes":
    """The trainer's teacher, or its teachers where a mapping names them; see both classes."""
    if isinstance(teacher, Mapping) or args.teachers is not None:
        return TeacherRoutes(teacher, args, student, tokenizer, accelerator)
    for name, value in (
        ("teacher_weights", args.teacher_weights),
        ("budget_scope", args.budget_scope),
    ):
        if value is not None and value not in ("global", "response"):
            raise ConfigError(
                f"{name}={value!r} is for several teachers, and there is one: set teachers"
            )
    return TeacherSource(teacher, args, student, tokenizer, accelerator)


class TeacherRoutes:
    """Scores generation batches with several teachers.

    Args:
        teachers: by name a model, a path, a URL, a `Teacher` or an entry of `args.teachers`; None:
            `args.teachers`. Both: the same names, the models as they are given.
        student: its vocabulary is what all must share.

    Raises:
        ConfigError, DataError, TeacherError: see `TeacherSource`; names the teacher.
    """

    model: Any = None
    """There is no single one."""

    def __init__(
        self,
        teachers: Mapping[str, Any] | None,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> None:
        entries = args.teachers or {}
        assert isinstance(entries, dict)
        given = entries if teachers is None else teachers
        if not isinstance(given, Mapping) or (entries and set(entries) != set(given)):
            raise ConfigError(
                f"teachers names {', '.join(entries)}, and teacher_model gives others: drop one of them"
            )
        beside = [name for name in ALONE if getattr(args, name) is not None]
        if beside:
            raise ConfigError(f"several teachers and {beside[0]}: one of them says who teaches")
        check_teachers(args, given)
        self._args, self._accelerator = args, accelerator
        self.sources: dict[str, TeacherSource] = {}
        """By name, in the order of `INDEX`."""
        self._about: dict[str, Any] = {}
        loaded = LoadedTeachers(student, tokenizer, accelerator)
        # Sorted: a checkpoint in the middle of a generation batch holds numbers, and a mapping's order says
        # nothing.
        for name, one in sorted(given.items()):
            teacher, entry = entry_of(name, one, entries.get(name))
            own = settings_of(args, name, entry)
            with naming(name):
                self.sources[name] = TeacherSource(
                    teacher, own, student, tokenizer, accelerator, name=name, loaded=loaded
                )
        # Heads of different sizes are all cut to the ids that everybody knows.
        self.vocab_size = min(source.vocab_size for source in self.sources.values())
        for source in self.sources.values():
            source.vocab_size = self.vocab_size
        bounded = [name for name, source in self.sources.items() if not source.offers_exact]
        self._bounded = bool(bounded)
        self._column = TeacherColumn(args.teacher_column, self.names)
        if bounded and len(bounded) < len(self.sources):
            logger.warning(
                "teacher %s gives a lower bound of C: so that no normalization mixes two kinds, C of all "
                "teachers is the bound, and their signals are those of two lists",
                ", ".join(bounded),
            )
            for source in self.sources.values():
                source.check_signals(exact=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the teachers."""
        return tuple(self.sources)

    def source(self, name: str) -> TeacherSource:
        """The teacher of this name."""
        return self.sources[name]

    @property
    def plains(self) -> list[PreTrainedModel]:
        """The models that run here, as they were loaded."""
        return [model for source in self.sources.values() for model in source.plains]

    @property
    def models(self) -> list[Any]:
        """The models that run here, prepared for this device; None for a teacher elsewhere."""
        return [source.model for source in self.sources.values()]

    @property
    def weights(self) -> tuple[float, ...]:
        """Factors on the loss of every teacher's rows."""
        factors = self._args.teacher_weights or {}
        assert isinstance(factors, dict)
        return tuple(float(factors.get(name, 1.0)) for name in self.sources)

    def watch(self, warn: Callable[[int, str, str], None]) -> TeacherWatches:
        """A watch of each in training: one that fails must not hide behind the others."""
        return TeacherWatches([TeacherWatch(self.vocab_size, warn, name) for name in self.sources])

    def route(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """What a batch is told of its rows: `INDEX`; see `TeacherColumn.index_of`."""
        index = [
            self._column.index_of(row, f"row {number} of the batch")
            for number, row in enumerate(rows)
        ]
        return {INDEX: torch.tensor(index, device=self._accelerator.device)}

    def check_dataset(self, dataset: Any, where: str) -> None:
        """See `TeacherColumn.check_dataset`."""
        idle = self._column.check_dataset(dataset, where)
        if idle and self._accelerator.is_main_process:
            logger.warning("no row of %s has the teacher %s", where, ", ".join(idle))

    def of_positions(self, batch: Mapping[str, Any], positions: Positions) -> Int[Tensor, " N"]:
        """Which teacher each position has."""
        if INDEX not in batch:
            raise DataError(
                f"a batch without {INDEX!r}: with several teachers every completion needs the index of its "
                f"own (0 to {len(self.sources) - 1}: {', '.join(self.sources)})"
            )
        return batch[INDEX][positions.row]

    # -- scoring ----------------------------------------------------------------------------------

    def score(
        self,
        forward: Forward,
        student: Any,
        batch: Mapping[str, Tensor],
        positions: Positions,
        *,
        stop_ids: Sequence[int],
        when: str,
        reuse: Reuse,
    ) -> Scored:
        """Signals of every position, each by its own teacher; see `TeacherSource.score`.

        Raises:
            NumericsError: the first of any teacher, once all have scored.
        """
        of_teacher = self.of_positions(batch, positions)
        size = self._args.per_device_train_batch_size
        given = Given.of(reuse, forward, student, batch, positions, micro_batch_size=size)
        found: dict[str, tuple[Tensor, Scored]] = {}
        problem: NumericsError | None = None
        parts, bounded = self._parts(of_teacher)
        for name, index in parts:
            try:
                scored = self.sources[name].score(
                    forward,
                    student,
                    batch,
                    positions.at(index),
                    stop_ids=stop_ids,
                    when=when,
                    reuse=given,
                )
            except NumericsError as error:
                # Raised after the loop: other processes go on to the next teacher.
                problem = problem or error
                continue
            found[name] = index, scored
        if problem is not None:
            raise problem
        return Scored(
            signals=self._merged(found, bounded),
            teacher_hidden=None,
            student_hidden=given.states if reuse.keep_student_graph else None,
            parts=tuple(
                (index, scored.teacher_hidden)
                for index, scored in found.values()
                if scored.teacher_hidden is not None
            ),
        )

    def _parts(
        self, of_teacher: Int[Tensor, " N"]
    ) -> tuple[list[tuple[str, Int[Tensor, " n"]]], bool]:
        """The teachers that score with the positions of each, and whether C is a bound for all of them.

        The same teachers, and the same answer, on every process.
        """
        counts = torch.bincount(of_teacher, minlength=len(self.sources) + 1)
        counts[-1] = self._bounded
        *total, bounded = self._accelerator.reduce(counts, reduction="sum").tolist()
        wanted = [place for place, count in enumerate(total) if count] or [0]
        parts = [(self.names[place], (of_teacher == place).nonzero()[:, 0]) for place in wanted]
        return parts, bounded > 0

    def _merged(self, found: Mapping[str, tuple[Tensor, Scored]], bounded: bool) -> TokenSignals:
        """The signals of all teachers in the order of the batch, with one kind of C."""
        parts = [scored.signals for _, scored in found.values()]
        exact = [part.compatibility_is_exact for part in parts]
        bounded = bounded or not all(exact)
        if bounded:
            parts = [as_bound(part) if part.compatibility_is_exact else part for part in parts]
        self._say(dict(zip(found, exact, strict=True)), "lower bound" if bounded else "exact")
        joined = concatenate(parts)
        order = torch.cat([index for index, _ in found.values()]).argsort()
        return taken(joined, order)

    def compare(
        self, forward: Forward, student: Any, batch: Mapping[str, Tensor]
    ) -> dict[str, Agreement]:
        """The scoring path of the student and of every teacher here against its own forward."""
        found: dict[str, Agreement] = {}
        for place, (name, source) in enumerate(self.sources.items()):
            rows = batch
            if INDEX in batch and bool((own := batch[INDEX] == place).any()):
                every = Positions.of(own[:, None].expand(len(own), 1))
                rows = used_rows(batch, every)
            for model, agreement in source.compare(forward, student, rows).items():
                found[f"teacher {name}" if model == "teacher" else model] = agreement
        return found

    def _say(self, exact: Mapping[str, bool], kind: str) -> None:
        """Write down who teaches and what C is, when it is known and whenever it changes."""
        about = {
            name: self.sources[name].describe() | {"exact": flag} for name, flag in exact.items()
        }
        known = self._about.get("teachers", {}) | about
        now = {"compatibility": kind, "teachers": known}
        if not self._accelerator.is_main_process or now == self._about:
            return
        self._about = now
        logger.info("teachers: %s", now)
        write_json(Path(self._args.output_dir) / FILE, now)
