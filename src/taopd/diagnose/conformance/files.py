"""Read recorded batches of the released selector: strict about form, lenient about numbers.

Form errors (a missing field, a wrong type, a length that does not fit) name file, batch, field and
what is expected. Log-probs may be NaN, infinite or null, lists short or empty, responses empty:
that is data, and METHOD R1 says what becomes of it.
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
from taopd.signals import ListMetrics, SignalTable

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
"""Used where neither batch nor selection names gamma. [METHOD section 6]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One recorded batch as tensors, rows in the order (response, position)."""

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
    response: Tensor
    position: Tensor
    valid: Tensor
    lengths: list[int]
    recorded: dict[str, dict[str, list[Json]]]
    selections: list[dict[str, Json]]

    def expected(self, key: str, ours: dict[str, list[Json]]) -> dict[str, list[Json]]:
        """The recorded columns under `key`, one per column of ours, checked."""
        columns = self.recorded[key]
        checked: dict[str, list[Json]] = {}
        for name in ours:
            place = f"{self.place}, {key}, {name}"
            values = pick(columns, name, f"{self.place}, {key}", list)
            if len(values) != len(self.places):
                raise DataError(
                    f"{place}: expected one value for each of {len(self.places)} positions, "
                    f"got {len(values)}"
                )
            checked[name] = [
                _expected_value(name, value, f"{place}[{row}]") for row, value in enumerate(values)
            ]
        return checked

    def flat_masks(self, recorded: dict[str, Json], place: str) -> list[int]:
        """The masks of one recorded selection, response after response."""
        masks = pick(recorded, "masks", place, list)
        shape = [len(mask) if isinstance(mask, list) else None for mask in masks]
        if shape != self.lengths:
            raise DataError(f"{place}, masks: expected lengths {self.lengths}, got {shape}")
        return [_flag(flag, f"{place}, masks") for mask in masks for flag in mask]


def pick(container: dict[str, Json], key: str, place: str, kind: type) -> Json:
    """`container[key]`, checked to be of a kind; float takes any finite number."""
    if key not in container:
        raise DataError(f"{place}: {key!r} is missing; tests/golden/README.md lists the fields")
    value = container[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good = {
        float: number and -LARGEST <= value <= LARGEST,
        int: number and isinstance(value, int),
    }.get(kind, isinstance(value, kind))
    if not good:
        wanted = "a finite number" if kind is float else f"{kind.__name__}"
        raise DataError(f"{place}, {key}: expected {wanted}, got {_shown(value)}")
    return value


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
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: expected a list of at least one batch, got {_shown(content)}")
    for number, raw in enumerate(content):
        place = f"{path}, batch {number}"
        if not isinstance(raw, dict):
            raise DataError(f"{place}: expected an object, got {_shown(raw)}")
        yield _batch(raw, place)


def table_of(batch: Batch, metrics: ListMetrics, compatibility: Tensor) -> SignalTable:
    """The signal table of a recorded batch with a chosen compatibility."""
    return SignalTable(
        disagreement=metrics.disagreement,
        compatibility=compatibility,
        entropy=metrics.student_entropy,
        response=batch.response,
        position=batch.position,
        valid=batch.valid,
    )


def _batch(raw: dict[str, Json], place: str) -> Batch:
    k = pick(raw, "K", place, int)
    if not 1 <= k <= MOST_ENTRIES:
        raise DataError(
            f"{place}, K: expected a whole number from 1 to {MOST_ENTRIES}, got {_shown(k)}"
        )
    gamma_key = next((key for key in ("gamma", "split_gamma") if key in raw), None)
    samples = pick(raw, "samples", place, list)
    rows: list[tuple[Json, ...]] = []
    lengths: list[int] = []
    places: list[str] = []
    for number, sample in enumerate(samples):
        here = f"{place}, response {number}"
        if not isinstance(sample, dict):
            raise DataError(f"{here}: expected an object, got {_shown(sample)}")
        response_rows = _response(sample, here)
        lengths.append(len(response_rows))
        for position in range(len(response_rows)):
            places.append(f"response {number}, position {position}")
        rows += [(number, position, *row) for position, row in enumerate(response_rows)]
    width = max([k, *(len(row[column]) for row in rows for column in (2, 3))])
    student_ids, student_logprobs = _lists([row[2] for row in rows], width)
    teacher_ids, teacher_logprobs = _lists([row[3] for row in rows], width)
    requested_logprobs = [
        [(row[4] or {}).get(token, -math.inf) for _, token in row[2]] for row in rows
    ]
    selections = pick(raw, "selections", place, list)
    for number, selection in enumerate(selections):
        if not isinstance(selection, dict):
            raise DataError(
                f"{place}, selections[{number}]: expected an object, got {_shown(selection)}"
            )

    def integers(column: int) -> Tensor:
        return torch.tensor([row[column] for row in rows], dtype=torch.int64)

    return Batch(
        place=place,
        places=places,
        k=k,
        gamma=pick(raw, gamma_key, place, float) if gamma_key else DEFAULT_GAMMA,
        student_ids=student_ids,
        student_logprobs=student_logprobs,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        requested=torch.tensor([row[4] is not None for row in rows], dtype=torch.bool),
        requested_logprobs=_padded(requested_logprobs, width, -math.inf, torch.float64),
        target_ids=integers(5),
        response=integers(0),
        position=integers(1),
        valid=integers(6).bool(),
        lengths=lengths,
        recorded={key: pick(raw, key, place, dict) for key in ("token_metrics", "scores")},
        selections=selections,
    )


def _response(sample: dict[str, Json], place: str) -> list[tuple[Json, ...]]:
    """Per position: (student list, teacher list, requested or None, token id, loss mask)."""
    tokens = pick(sample, "token_ids", place, list)
    columns = {name: pick(sample, name, place, list) for name in ("student_top", "teacher_top")}
    columns["loss_mask"] = pick(sample, "loss_mask", place, list)
    requested = sample.get("teacher_requested")
    if requested is None:
        requested = [None] * len(tokens)
    if not isinstance(requested, list):
        raise DataError(
            f"{place}, teacher_requested: expected a list or null, got {_shown(requested)}"
        )
    columns["teacher_requested"] = requested
    for name, column in columns.items():
        if len(column) != len(tokens):
            raise DataError(
                f"{place}, {name}: expected {len(tokens)} entries, one per token id, "
                f"got {len(column)}"
            )
    rows = []
    for position, token in enumerate(tokens):
        here = f"{place}, position {position}"
        known = columns["teacher_requested"][position]
        if known is not None:
            known = {
                token_id: logprob
                for logprob, token_id in _entries(known, f"{here}, teacher_requested")
                if math.isfinite(logprob)
            }
        rows.append(
            (
                _entries(columns["student_top"][position], f"{here}, student_top"),
                _entries(columns["teacher_top"][position], f"{here}, teacher_top"),
                known,
                _token_id(token, f"{here}, token_ids"),
                _flag(columns["loss_mask"][position], f"{here}, loss_mask"),
            )
        )
    return rows


def _entries(entries: Json, place: str) -> list[tuple[float, int]]:
    if not isinstance(entries, list):
        raise DataError(f"{place}: expected a list of [logprob, token id], got {_shown(entries)}")
    checked = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise DataError(f"{place}: expected [logprob, token id], got {_shown(entry)}")
        logprob, token = entry
        wide = isinstance(logprob, int) and abs(logprob) > LARGEST
        if wide or isinstance(logprob, bool) or not isinstance(logprob, int | float | None):
            raise DataError(f"{place}: expected a log-prob in nats, got {_shown(logprob)}")
        checked.append((math.nan if logprob is None else float(logprob), _token_id(token, place)))
    return checked


def _token_id(token: Json, place: str) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**53:
        raise DataError(f"{place}: expected a token id, a whole number >= 0, got {_shown(token)}")
    return token


def _flag(flag: Json, place: str) -> int:
    if flag not in (0, 1) or not isinstance(flag, int):
        raise DataError(f"{place}: expected 0 or 1, got {_shown(flag)}")
    return int(flag)


def _expected_value(name: str, value: Json, place: str) -> Json:
    if name == "quadrant":
        if not isinstance(value, str) or value not in QUADRANT_NAMES:
            raise DataError(f"{place}: expected one of {list(QUADRANT_NAMES)}, got {_shown(value)}")
        return QUADRANT_NAMES[value]
    if value is None:
        return None
    return pick({name: value}, name, place, int if name in INTEGER_COLUMNS else float)


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


def _shown(value: Json) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
