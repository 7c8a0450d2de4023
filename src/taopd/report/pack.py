"""Rollouts as a few compressed columns that a browser reads without a library.

Why columns and not JSON: 200 rollouts of 512 tokens with both models' lists are 40 MB of JSON. A column
is one number per token (or list entry) as one or two byte planes; all columns together are one deflate
stream in base64, which every current browser inflates itself (DecompressionStream).

Coding: a number becomes the place of its square root between those of low and high, in 1,023 steps.
Roots keep the sign. A probability becomes round(255 sqrt(p)). Small values keep their digits and their
sign, large ones are right to half a per cent. 65535: not a number.
"""

import base64
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from taopd.report.rollouts import Rollout, unit_of
from taopd.report.text import readable, visible
from taopd.runs.limits import LIST_FLOOR
from taopd.runs.signal_names import SHADES, SIGNALS, SignalName

LEVELS, MISSING = 1023, 65535
FLOORS = (0.0, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 1e-1)
MAX_PROMPT, MAX_BYTES = 4000, 4_200_000


@dataclass(slots=True)
class Packer:
    """Columns, in the order they were added, and where each lies in the stream."""

    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    _planes: list[bytes] = field(default_factory=list)
    _size: int = 0

    def integers(self, name: str, values: np.ndarray) -> None:
        """Add whole numbers of at least 0 in as many byte planes as the largest needs."""
        largest = int(values.max(initial=0))
        width = 1 if largest < 2**8 else 2 if largest < 2**16 else 4
        whole = values.astype(np.uint32)
        planes = [(whole >> (8 * place) & 255).astype(np.uint8).tobytes() for place in range(width)]
        self.columns[name] = {"at": self._size, "n": len(values), "width": width}
        self._planes += planes
        self._size += sum(map(len, planes))

    def numbers(self, name: str, values: np.ndarray) -> None:
        """Add real numbers, coded between their smallest and largest."""
        finite = np.isfinite(values)
        low = float(values[finite].min()) if finite.any() else 0.0
        high = float(values[finite].max()) if finite.any() else 1.0
        roots = _root(np.where(finite, values, low))
        start, end = _root(np.array([low, high]))
        place = (roots - start) / (end - start or 1.0)
        codes = np.where(finite, np.round(LEVELS * place), MISSING).astype(np.uint32)
        self.integers(name, codes)
        self.columns[name] |= {"low": low, "high": high}

    def copy(self) -> "Packer":
        """The same columns, to which others can be added."""
        return Packer(columns=dict(self.columns), _planes=list(self._planes), _size=self._size)

    def base64(self) -> str:
        """All columns, deflated."""
        return base64.b64encode(zlib.compress(b"".join(self._planes), 6)).decode("ascii")


def _root(values: np.ndarray) -> np.ndarray:
    """The square root of a size, with the sign of the value: a gain is near 0 from both sides."""
    return np.sign(values) * np.sqrt(np.abs(values))


def pack(rollouts: Sequence[Rollout]) -> tuple[dict[str, Any], str]:
    """What the page's script reads: a description and the stream.

    Where the stream would be longer than `MAX_BYTES`, entries of the top-K lists that neither model
    finds likely are left out; the description's "floor" says below which probability.
    """
    words = _Words()
    tokens = np.array([words.of(piece) for rollout in rollouts for piece in rollout.pieces])
    names = [_names(rollout, words) for rollout in rollouts]
    unknown = words.of("⟨no such id⟩")
    lists = {model: _entries(rollouts, model, names, unknown) for model in ("student", "teacher")}
    order, listed = words.by_frequency([tokens, lists["student"].word, lists["teacher"].word])
    _note_others(lists, len(listed))
    fixed = Packer()
    fixed.integers("token", order[tokens])
    _pack_signals(fixed, rollouts)

    @cache
    def packed(floor: float) -> tuple[Packer, str]:
        packer = fixed.copy()
        _pack_lists(packer, lists, order, floor)
        return packer, packer.base64()

    def fits(floor: float) -> bool:
        return len(packed(floor)[1]) <= MAX_BYTES

    floor = FLOORS[0]
    if not fits(floor):  # The stream shrinks as the floor rises.
        floor = FLOORS[bisect_left(FLOORS, True, 1, len(FLOORS) - 1, key=fits)]
    packer, stream = packed(floor)
    start = np.cumsum([0, *map(len, rollouts)])
    pairs = zip(rollouts, start, strict=False)
    described = {
        "columns": packer.columns,
        "signals": {key: _shade(signal, rollouts) for key, signal in SHADES.items()},
        "words": listed,
        "floor": max(floor, LIST_FLOOR),
        "rollouts": [_described(rollout, int(at)) for rollout, at in pairs],
    }
    return described, stream


def _shade(signal: SignalName, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What the page's script knows of a signal."""
    return {
        "name": signal.name,
        "short": signal.short,
        "unit": unit_of(signal, rollouts),
        "ramp": signal.ramp,
        "to": signal.top,
    }


def _pack_signals(packer: Packer, rollouts: Sequence[Rollout]) -> None:
    for name in SIGNALS:
        column = _joined(rollouts, name, None)
        if column is not None:
            packer.numbers(name, column)
    packer.integers("rank", _whole(rollouts, "rank", -1) + 1)
    flags = _whole(rollouts, "kept", 0) + 2 * _whole(rollouts, "anchored", 0)
    packer.integers("flags", flags)
    packer.integers("quadrant", _whole(rollouts, "quadrant", 0))


class _Words:
    """Every distinct readable token once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def of(self, word: str) -> int:
        return self._places.setdefault(word, len(self._places))

    def by_frequency(self, used: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """New places by old ones, the most frequent word first, and the words in that order.

        Frequent words then differ in their low byte only, which compresses.
        """
        listed = list(self._places)
        counts = np.bincount(np.concatenate(used).astype(np.int64), minlength=len(listed))
        first = np.argsort(-counts, kind="stable")
        places = np.empty(len(listed), np.int64)
        places[first] = np.arange(len(listed))
        return places, [listed[place] for place in first]


@dataclass(slots=True, kw_only=True)
class _Entries:
    """All entries of one model's lists, token after token."""

    token: np.ndarray
    """Which token of the report an entry belongs to, ascending."""
    word: np.ndarray
    logprob: np.ndarray
    num_tokens: int
    best: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """The larger of both models' log-probs of this word, as far as the lists say."""


def _names(rollout: Rollout, words: _Words) -> dict[int, int]:
    """The word of every token id that a rollout names."""
    named = rollout.line.get("vocabulary", {})
    return {int(token): words.of(readable(text, rollout.kind)) for token, text in named.items()}


def _entries(
    rollouts: Sequence[Rollout], model: str, names: Sequence[dict[int, int]], unknown: int
) -> _Entries:
    counts: list[int] = []
    found: list[int] = []
    logprobs: list[float] = []
    for rollout, known in zip(rollouts, names, strict=True):
        top = rollout.line.get(f"{model}_top")
        if not top:
            counts += [0] * len(rollout)
            continue
        counts += map(len, top["ids"])
        found += [known.get(token, unknown) for row in top["ids"] for token in row]
        logprobs += [logprob for row in top["logprobs"] for logprob in row]
    return _Entries(
        token=np.repeat(np.arange(len(counts)), counts),
        word=np.array(found, np.int64),
        logprob=np.array(logprobs, float),
        num_tokens=len(counts),
    )


def _note_others(lists: dict[str, _Entries], num_words: int) -> None:
    """Fill in `best`: once, because every floor that is tried asks for it."""
    for model, other in (("student", "teacher"), ("teacher", "student")):
        one, two = lists[model], lists[other]
        one.best = one.logprob.copy()
        if not len(two.word):
            continue
        names = two.token * num_words + two.word
        order = np.lexsort((two.logprob, names))  # The last of equal names is the likeliest.
        wanted = one.token * num_words + one.word
        at = order[np.searchsorted(names[order], wanted, side="right") - 1]
        theirs = np.where(names[at] == wanted, two.logprob[at], -np.inf)
        np.maximum(one.best, theirs, out=one.best)


def _pack_lists(
    packer: Packer, lists: dict[str, _Entries], order: np.ndarray, floor: float
) -> None:
    """Both models' lists without what both find less likely than `floor`.

    A word of the teacher's list that the student's holds too is written as its place there.
    """
    size = len(order)
    least = np.log(floor) if floor else -np.inf
    names = {model: one.token * size + one.word for model, one in lists.items()}
    kept = {model: one.best > least for model, one in lists.items()}
    for model, one in lists.items():
        mask = kept[model]
        packer.integers(f"{model}_count", np.bincount(one.token[mask], minlength=one.num_tokens))
        packer.integers(f"{model}_p", np.round(255 * np.exp(one.logprob[mask] / 2)))
    mine, theirs = (names[model][kept[model]] for model in ("student", "teacher"))
    place = _places(mine, theirs, lists["student"].token[kept["student"]])
    packer.integers("student_word", order[lists["student"].word[kept["student"]]])
    packer.integers("teacher_place", place)
    packer.integers("teacher_word", order[lists["teacher"].word[kept["teacher"]][place == 0]])


def _places(mine: np.ndarray, theirs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """1-based place of each of their (token, word) pairs in my list of that token; 0: not in it."""
    if not len(mine):
        return np.zeros(len(theirs), np.int64)
    begins = np.searchsorted(tokens, tokens)
    ascending = np.argsort(mine, kind="stable")
    found = np.minimum(np.searchsorted(mine[ascending], theirs), len(mine) - 1)
    at = ascending[found]
    return np.where(mine[at] == theirs, at - begins[at] + 1, 0)


def _joined(rollouts: Sequence[Rollout], name: str, default: Any) -> np.ndarray | None:
    if not any(name in rollout.line for rollout in rollouts):
        return None
    parts = [rollout.line.get(name) or [default] * len(rollout) for rollout in rollouts]
    values = [np.nan if value is None else value for part in parts for value in part]
    return np.array(values, float)


def _whole(rollouts: Sequence[Rollout], name: str, default: int) -> np.ndarray:
    column = _joined(rollouts, name, default)
    size = sum(map(len, rollouts))
    return np.full(size, default) if column is None else np.nan_to_num(column).astype(np.int64)


def _shortened(text: str) -> str:
    cut = f"…⟨{len(text) - MAX_PROMPT} more characters⟩" if len(text) > MAX_PROMPT else ""
    return visible(text[:MAX_PROMPT]) + cut


def _described(rollout: Rollout, start: int) -> dict[str, Any]:
    """What the list of rollouts shows and sorts by."""
    line, size = rollout.line, max(1, len(rollout))
    own = line.get("teacher_prompt")
    return {
        "run": visible(rollout.run),
        "step": rollout.step,
        "teacher": visible(str(line["teacher"])) if line.get("teacher") else None,
        "start": start,
        "n": len(rollout),
        "prompt": _shortened(rollout.prompt),
        "around": [_shortened(part) for part in rollout.around],
        "teacherPrompt": None if own is None else _shortened(str(own)),
        "answer": None if line.get("answer") is None else visible(str(line["answer"]))[:200],
        "correct": rollout.correct,
        "truncated": bool(line.get("truncated")),
        "toolResults": [[after, visible(text)] for after, text in line.get("tool_results", [])],
        "numValid": line.get("num_valid"),
        "cut": line.get("cut"),
        # Null where nothing was selected, as in a bank, or not measured: a 0 would be a number.
        "kept": sum(map(bool, line["kept"])) / size if line.get("kept") else None,
        "meanD": _mean(line.get("disagreement")),
        "meanI": _mean(line.get("incompatible")),
        "label": visible(line["label"]) if "label" in line else None,
    }


def _mean(values: Any) -> float | None:
    numbers = [value for value in values or [] if value is not None]
    return round(sum(numbers) / len(numbers), 5) if numbers else None
