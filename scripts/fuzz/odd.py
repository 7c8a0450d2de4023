"""Inputs with something wrong in them: a valid document, changed in a few places by a string of bytes.

All choices are read from the bytes, so that one harness serves a coverage-guided fuzzer (libFuzzer mutates
the bytes), hypothesis (which shrinks them) and plain chance; the same bytes are the same input.
"""

import copy
import json
import math
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.5, 0.5, 1.5, 1e-300, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *(
        "",
        " ",
        "x",
        "0",
        "1e-6",
        "nan",
        "true",
        "null",
        "\x00",
        "a\x00b",
        "\ud800",
        "\u202e",
        "\u2028",
    ),
    *(
        "../../outside",
        "/outside",
        "..",
        ".",
        "con",
        "a/b",
        "~",
        "a" * 300,
        "w" * 5000,
        "%s%n",
        "{0}",
    ),
    *(
        "</script><script>alert(1)</script>",
        "<!--",
        "[bold]x[/bold]",
        "[/]",
        "\x1b[31m",
        "os.system",
    ),
    *("2001-99-99", "0b", "!!python/object/apply:os.system ['true']", "&a [*a]", "hf_" + "a" * 34),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": None},
        {"x": {"y": []}},
        [None],
        [1, "x", None],
        [[1, 2], [3]],
        [0] * 50,
    ),
)
_TEXTS = ("", "name", "__proto__", "..", "step", "\x00", "a" * 300, "0", "é")


class Choices:
    """Numbers read from bytes, two bytes each; zeros after the last."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """A number in [0, count)."""
        pair = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(pair, "little") % count if count > 1 else 0

    def of(self, options: Any) -> Any:
        """One of a sequence."""
        return options[self.below(len(options))]

    def rest(self) -> bytes:
        """The bytes that are left."""
        rest, self._at = self._data[self._at :], len(self._data)
        return rest


def changed(document: Any, choices: Choices, most: int = 4) -> Any:
    """A copy with one to `most` places changed: replaced, removed, doubled, moved, wrapped, made text."""
    document = [copy.deepcopy(document)]
    for _ in range(1 + choices.below(most)):
        holder, key = _place(document, choices)
        _change(holder, key, document, choices)
    return document[0] if document else None


def _place(document: list, choices: Choices) -> tuple[Any, Any]:
    """A container and a key in it, found by walking down at random."""
    holder, key = document, 0
    while True:
        inner = holder[key]
        if not isinstance(inner, (list, dict)) or not inner or choices.below(6) == 0:
            return holder, key
        holder = inner
        key = choices.of(list(inner)) if isinstance(inner, dict) else choices.below(len(inner))


def _change(holder: Any, key: Any, document: list, choices: Choices) -> None:
    kind = choices.below(8)
    value = holder[key]
    if kind <= 2:
        holder[key] = copy.deepcopy(choices.of(ODD))
    elif kind == 3 and holder is not document:
        del holder[key]
    elif kind == 4:
        other, place = _place(document, choices)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 5:
        holder[key] = choices.of(([value], {"x": value}, str(value)[:200]))
    elif kind == 6 and isinstance(holder, list) and holder is not document:
        holder.insert(key, copy.deepcopy(value))
    elif isinstance(holder, dict):
        holder[choices.of(_TEXTS)] = copy.deepcopy(choices.of(ODD))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = choices.of((-value, value + 1, value * 0.3 if abs(value) < 1e300 else 0.5))


def torn(data: bytes, choices: Choices, most: int = 3) -> bytes:
    """Bytes with one to `most` edits: cut off, cut out, overwritten, inserted, doubled."""
    for _ in range(1 + choices.below(most)):
        at, kind, size = choices.below(len(data) + 1), choices.below(5), 1 + choices.below(24)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + size :]
        elif kind == 2:
            new = bytes(choices.below(256) for _ in range(min(size, 4)))
            data = data[:at] + new + data[at + len(new) :]
        elif kind == 3:
            new = choices.of(
                (b"\x00", b"\xff\xfe", b"{", b"[" * 3000, b'"', b"\n", b": ", b"- ", b"!!")
            )
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at : at + size] + data[at:]
    return data


def as_json(document: Any) -> bytes:
    """JSON with what JSON should not hold (NaN, lone surrogates) as Python writes it."""
    return json.dumps(document, default=str).encode("utf-8", "surrogatepass")
