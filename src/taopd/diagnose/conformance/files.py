"""Read recorded batches of the released selector: strict about form, lenient about numbers.

Form errors (a missing field, a wrong type, a length that does not fit) name file, batch, field and
what is expected. Log-probs may be NaN, infinite or null, lists short or empty, responses empty:
that is data, and R1 says what becomes of it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taopd.errors import DataError
from taopd.runs.validation import (
    ANY,
    MARK,
    TEXT,
    Leaf,
    Maybe,
    Some,
    fit,
    number,
    whole,
)

Json = Any
"""A parsed JSON value, checked where it is used."""

QUADRANT_NAMES = {
    "Q1_highH_highD": 1,
    "Q2_highH_lowD": 2,
    "Q3_lowH_highD": 3,
    "Q4_lowH_lowD": 4,
}
INTEGER_COLUMNS = ("reach_t1", "target_student_rank", "target_teacher_rank")
LARGEST = 1e300
"""Of a number that must be finite."""
MOST_ENTRIES = 2**18
"""Of a list: more than any vocabulary has."""
DEFAULT_GAMMA = 0.5
"""Used where neither batch nor selection names gamma. [docs/released-code.md]"""

FINITE = number(-LARGEST, LARGEST)
_TOKEN_ID = whole(0, 2**53 - 1)
_LOGPROB = Leaf(
    "a log-prob in nats or null",
    lambda v: v is None or type(v) is float or (type(v) is int and abs(v) <= LARGEST),
)
_LIST = [(_LOGPROB, _TOKEN_ID)]
_SAMPLE = {
    "token_ids": [_TOKEN_ID],
    "student_top": [_LIST],
    "teacher_top": [_LIST],
    "teacher_requested?": Maybe([Maybe(_LIST)]),
    "loss_mask": [MARK],
}
_BATCH = {
    "K": whole(1, MOST_ENTRIES),
    "gamma?": FINITE,
    "split_gamma?": FINITE,
    "samples": [_SAMPLE],
    "token_metrics": {...: ANY},
    "scores": {...: ANY},
    "selections": [{"method": TEXT}],
}
SELECTION = {
    "ratio": FINITE,
    "min_keep": Leaf("a whole number", lambda v: type(v) is int),
    "gamma?": FINITE,
    "split_gamma?": FINITE,
    "normalization?": TEXT,
    "proxy?": TEXT,
    "masks": [[MARK]],
}
"""Of a selection that can be recomputed."""
_COLUMNS: dict[str, Any] = {
    "quadrant": Leaf(f"one of {list(QUADRANT_NAMES)}", lambda v: v in list(QUADRANT_NAMES)),
    **{name: Maybe(whole(-(2**53))) for name in INTEGER_COLUMNS},
}
"""Of recorded columns; all others hold finite numbers or null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One recorded batch as tensors, rows in the order (completion, position)."""

    place: str
    places: list[str]
    """Name of every row, for messages."""
    k: int
    gamma: float
    student_ids: Tensor
    student_logprobs: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    requested: Tensor
    """bool [N]: were the teacher's log-probs on the student's ids recorded?"""
    requested_logprobs: Tensor
    """[N, K]; -inf where an id was not recorded."""
    target_ids: Tensor
    completion: Tensor
    position: Tensor
    valid: Tensor
    lengths: list[int]
    recorded: dict[str, dict[str, list[Json]]]
    selections: list[dict[str, Json]]

    def expected(self, key: str, ours: dict[str, list[Json]]) -> dict[str, list[Json]]:
        """The recorded columns under `key`, one per column of ours, checked."""
        columns, place = self.recorded[key], f"{self.place}, {key}"
        fit(columns, {name: [_COLUMNS.get(name, Maybe(FINITE))] for name in ours}, place)
        for name in ours:
            if len(columns[name]) != len(self.places):
                raise DataError(
                    f"{place}, {name}: expected one value for each of {len(self.places)} positions, "
                    f"got {len(columns[name])}"
                )
        if "quadrant" in ours:
            return columns | {"quadrant": [QUADRANT_NAMES[name] for name in columns["quadrant"]]}
        return columns

    def flat_masks(self, recorded: dict[str, Json], place: str) -> list[int]:
        """The masks of one recorded selection, completion after completion."""
        masks = recorded["masks"]
        if [len(mask) for mask in masks] != self.lengths:
            raise DataError(
                f"{place}, masks: expected lengths {self.lengths}, got {[len(mask) for mask in masks]}"
            )
        return [int(flag) for mask in masks for flag in mask]


def read_batches(path: Path) -> Iterator[Batch]:
    """Every batch of a file.

    Raises:
        DataError: with the file, batch and field that is not as it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected a list of batches") from error
    fit(content, Some(ANY), str(path))
    for index, raw in enumerate(content):
        place = f"{path}, batch {index}"
        fit(raw, _BATCH, place)
        yield _batch(raw, place)


def _batch(raw: dict[str, Json], place: str) -> Batch:
    """The tensors of one batch whose form is that of `_BATCH`."""
    k, samples = raw["K"], raw["samples"]
    rows: list[tuple[Json, ...]] = []
    places: list[str] = []
    for completion, sample in enumerate(samples):
        for position, row in enumerate(_response(sample, f"{place}, completion {completion}")):
            places.append(f"response {completion}, position {position}")
            rows.append((completion, position, *row))
    width = max([k, *(len(row[column]) for row in rows for column in (2, 3))])
    student_ids, student_logprobs = _lists([row[2] for row in rows], width)
    teacher_ids, teacher_logprobs = _lists([row[3] for row in rows], width)
    requested_logprobs = [
        [(row[4] or {}).get(token, -math.inf) for _, token in row[2]] for row in rows
    ]

    def integers(column: int) -> Tensor:
        return torch.tensor([row[column] for row in rows], dtype=torch.int64)

    return Batch(
        place=place,
        places=places,
        k=k,
        gamma=raw["gamma"] if "gamma" in raw else raw.get("split_gamma", DEFAULT_GAMMA),
        student_ids=student_ids,
        student_logprobs=student_logprobs,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        requested=torch.tensor([row[4] is not None for row in rows], dtype=torch.bool),
        requested_logprobs=_padded(requested_logprobs, width, -math.inf, torch.float64),
        target_ids=integers(5),
        completion=integers(0),
        position=integers(1),
        valid=integers(6).bool(),
        lengths=[len(sample["token_ids"]) for sample in samples],
        recorded={key: raw[key] for key in ("token_metrics", "scores")},
        selections=raw["selections"],
    )


def _response(sample: dict[str, Json], place: str) -> Iterator[tuple[Json, ...]]:
    """Per position: (student list, teacher list, requested or None, token id, loss mask)."""
    tokens = sample["token_ids"]
    columns = {name: sample[name] for name in ("student_top", "teacher_top", "loss_mask")}
    known = sample.get("teacher_requested")
    columns["teacher_requested"] = [None] * len(tokens) if known is None else known
    for name, column in columns.items():
        if len(column) != len(tokens):
            raise DataError(
                f"{place}, {name}: expected {len(tokens)} entries, one per token id, "
                f"got {len(column)}"
            )
    for position, token in enumerate(tokens):
        student, teacher, flag, known = (column[position] for column in columns.values())
        if known is not None:
            known = {
                token_id: logprob for logprob, token_id in _entries(known) if math.isfinite(logprob)
            }
        yield _entries(student), _entries(teacher), known, token, int(flag)


def _entries(entries: Json) -> list[tuple[float, int]]:
    """A recorded list; null is NaN."""
    return [(math.nan if logprob is None else float(logprob), token) for logprob, token in entries]


def _lists(lists: list[list[tuple[float, int]]], width: int) -> tuple[Tensor, Tensor]:
    ids = [[token for _, token in entries] for entries in lists]
    logprobs = [[logprob for logprob, _ in entries] for entries in lists]
    return (
        _padded(ids, width, -1, torch.int64),
        _padded(logprobs, width, -math.inf, torch.float64),
    )


def _padded(rows: list[list[Json]], width: int, pad: float, dtype: torch.dtype) -> Tensor:
    padded = [row + [pad] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)
