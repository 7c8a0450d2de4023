"""Rollouts as a few compressed columns that a browser reads without a library.

Why columns and not JSON: 200 rollouts of 512 tokens with both models' lists are 40 MB of JSON. A column
is one number per token (or list entry) as one or two byte planes; all columns together are one deflate
stream in base64, which every current browser inflates itself (DecompressionStream).

Coding: a number becomes round(1023 sqrt((v - low) / (high - low))), a probability round(255 sqrt(p));
small values keep their digits, large ones are right to a quarter of a per cent. 65535: not a number.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taopd.report.rollouts import Rollout
from taopd.report.text import readable, visible

LEVELS, MISSING = 1023, 65535
SIGNALS = (
    *("disagreement", "compatibility", "entropy", "score", "learnable", "incompatible", "gain"),
    *("student_logprob", "teacher_logprob"),
)
FLOORS = (0.0, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 1e-1)
MAX_PROMPT = 4000


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
        span = high - low or 1.0
        place = np.sqrt(np.clip((np.where(finite, values, low) - low) / span, 0.0, 1.0))
        codes = np.where(finite, np.round(LEVELS * place), MISSING).astype(np.uint32)
        self.integers(name, codes)
        self.columns[name] |= {"low": low, "high": high}

    def base64(self) -> str:
        """All columns, deflated."""
        return base64.b64encode(zlib.compress(b"".join(self._planes), 9)).decode("ascii")


def pack(rollouts: Sequence[Rollout], *, max_bytes: int = 4_200_000) -> tuple[dict[str, Any], str]:
    """What the page's script reads: a description and the stream.

    Where the stream would be longer than `max_bytes`, entries of the top-K lists that neither model
    finds likely are left out; the description's "floor" says below which probability.
    """
    for floor in FLOORS:
        described, stream = _pack(rollouts, floor)
        if len(stream) <= max_bytes:
            break
    return described, stream


def _pack(rollouts: Sequence[Rollout], floor: float) -> tuple[dict[str, Any], str]:
    packer, words = Packer(), _Words()
    tokens = [words.of(piece) for rollout in rollouts for piece in rollout.pieces]
    packer.integers("token", np.array(tokens))
    for name in SIGNALS:
        column = _joined(rollouts, name, None)
        if column is not None:
            packer.numbers(name, column)
    packer.integers("rank", _whole(rollouts, "rank", -1) + 1)
    flags = _whole(rollouts, "kept", 0) + 2 * _whole(rollouts, "anchored", 0)
    packer.integers("flags", flags)
    packer.integers("quadrant", _whole(rollouts, "quadrant", 0))
    _pack_lists(packer, rollouts, words, floor)
    start = np.cumsum([0, *map(len, rollouts)])
    described = {
        "columns": packer.columns,
        "words": words.list,
        "floor": floor,
        "rollouts": [
            _described(rollout, int(at)) for rollout, at in zip(rollouts, start, strict=False)
        ],
    }
    return described, packer.base64()


class _Words:
    """Every distinct readable token once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def of(self, word: str) -> int:
        return self._places.setdefault(word, len(self._places))

    @property
    def list(self) -> list[str]:
        return list(self._places)


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


def _pack_lists(packer: Packer, rollouts: Sequence[Rollout], words: _Words, floor: float) -> None:
    """Both models' lists: how many entries a token has, their words and their probabilities."""
    for model in ("student", "teacher"):
        other = "teacher" if model == "student" else "student"
        counts: list[int] = []
        ids: list[int] = []
        logprobs: list[float] = []
        for rollout in rollouts:
            line = rollout.line
            mine, theirs = line.get(f"{model}_top"), line.get(f"{other}_top")
            if not mine or not theirs:
                counts += [0] * len(rollout)
                continue
            names = {
                int(token): words.of(readable(text, rollout.kind))
                for token, text in line.get("vocabulary", {}).items()
            }
            unknown = words.of("⟨no such id⟩")
            rows = zip(
                mine["ids"], mine["logprobs"], theirs["ids"], theirs["logprobs"], strict=True
            )
            for row_ids, row_logprobs, their_ids, their_logprobs in rows:
                pairs = list(zip(row_ids, row_logprobs, strict=True))
                if floor:
                    least = float(np.log(floor))
                    likely = {
                        t for t, p in zip(their_ids, their_logprobs, strict=True) if p > least
                    }
                    pairs = [(t, p) for t, p in pairs if p > least or t in likely]
                counts.append(len(pairs))
                ids += [names.get(token, unknown) for token, _ in pairs]
                logprobs += [logprob for _, logprob in pairs]
        packer.integers(f"{model}_count", np.array(counts))
        packer.integers(f"{model}_word", np.array(ids))
        packer.integers(f"{model}_p", np.round(255 * np.exp(np.array(logprobs) / 2)))


def _described(rollout: Rollout, start: int) -> dict[str, Any]:
    """What the list of rollouts shows and sorts by."""
    line, size = rollout.line, max(1, len(rollout))
    prompt = str(line.get("prompt", ""))
    cut = f"…⟨{len(prompt) - MAX_PROMPT} more characters⟩" if len(prompt) > MAX_PROMPT else ""
    return {
        "run": rollout.run,
        "step": rollout.step,
        "start": start,
        "n": len(rollout),
        "prompt": visible(prompt[:MAX_PROMPT]) + cut,
        "answer": None if line.get("answer") is None else visible(str(line["answer"]))[:200],
        "correct": rollout.correct,
        "truncated": bool(line.get("truncated")),
        "numValid": line.get("num_valid"),
        "cut": line.get("cut"),
        "kept": sum(map(bool, line.get("kept") or [])) / size,
        "meanD": _mean(line.get("disagreement")),
        "meanI": _mean(line.get("incompatible")),
        "label": line.get("label"),
    }


def _mean(values: Any) -> float:
    numbers = [value for value in values or [] if value is not None]
    return round(sum(numbers) / len(numbers), 5) if numbers else 0.0
