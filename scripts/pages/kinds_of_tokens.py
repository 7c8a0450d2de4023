"""What the tokens of a worked sum are, read from a line of `rollouts.jsonl`.

begin     the first token of the text
told      digits of a number right after "=" that the teacher's prompt has and the student's has not
result    digits of another number right after "="
number    other digits
operator  + - * / x = and the like
end       a stop token
word      letters
rest      spaces, line ends, punctuation

A token of several kinds, such as "=4", is of the first that fits; an end that is all of the text is an end.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("begin", "told", "result", "number", "operator", "end", "word", "rest")
WORDS = {
    "begin": "first token of the text",
    "told": "digit of a result, as the context has it",
    "result": "digit of another result",
    "number": "other digit",
    "operator": "operator",
    "end": "end of the text",
    "word": "word",
    "rest": "spaces, punctuation",
}
_NUMBER = re.compile(r"\d+")
_RESULT = re.compile(r"=\s*(\d+)")
_OPERATORS = frozenset("+-*/=")


def texts(line: Mapping[str, Any]) -> list[str]:
    """The tokens of a rollout as they read; byte-level marks of spaces and line ends undone."""
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in line["tokens"]]


def kinds(line: Mapping[str, Any]) -> list[str]:
    """The kind of every token of a rollout.

    Args:
        line: with tokens, truncated, prompt and, where the teacher has its own, teacher_prompt.
    """
    shown = texts(line)
    told = _numbers(line.get("teacher_prompt", "")) - _numbers(line["prompt"])
    results = [
        (match.span(1), match.group(1) in told) for match in _RESULT.finditer("".join(shown))
    ]
    found, begin = [], 0
    for place, text in enumerate(shown):
        end = begin + len(text)
        inside = [was_told for (low, high), was_told in results if low < end and begin < high]
        if place == len(shown) - 1 and not line["truncated"]:
            found.append("end")
        else:
            found.append(_kind(text, inside) if place else "begin")
        begin = end
    return found


def _kind(text: str, results: list[bool]) -> str:
    if results:
        return "told" if results[0] else "result"
    if any(character.isdigit() for character in text):
        return "number"
    if set(text.strip()) & _OPERATORS or text.strip() == "x":
        return "operator"
    return "word" if any(character.isalpha() for character in text) else "rest"


def _numbers(text: str) -> set[str]:
    return set(_NUMBER.findall(text))


Counts = dict[str, dict[str, float]]
"""Of the tokens of each kind: their number, the sums of D (nats) and of C, and how many were kept."""


def counts(lines: list[dict[str, Any]]) -> Counts:
    """What is added up of some rollouts, by kind; kinds without a token are left out."""
    names = np.array([kind for line in lines for kind in kinds(line)])
    columns = {name: _column(lines, name) for name in ("disagreement", "compatibility", "kept")}
    return {
        kind: {"tokens": int((names == kind).sum())}
        | {name: float(values[names == kind].sum()) for name, values in columns.items()}
        for kind in KINDS
        if (names == kind).any()
    }


def added(parts: Iterable[Counts]) -> Counts:
    """The counts of several runs as one."""
    found: Counts = {}
    for part in parts:
        for kind, sums in part.items():
            into = found.setdefault(kind, dict.fromkeys(sums, 0))
            for name, value in sums.items():
                into[name] += value
    return {kind: found[kind] for kind in KINDS if kind in found}


def by_kind(found: Counts) -> dict[str, dict[str, float]]:
    """By kind: tokens, share of all tokens, mean D and C, share of D's sum, share kept.

    D in nats, C in [0, 1], as `rollouts.jsonl` has them.
    """
    tokens = sum(sums["tokens"] for sums in found.values())
    disagreement = sum(sums["disagreement"] for sums in found.values())
    return {
        kind: {
            "tokens": sums["tokens"],
            "share": sums["tokens"] / tokens,
            "disagreement": sums["disagreement"] / sums["tokens"],
            "compatibility": sums["compatibility"] / sums["tokens"],
            "share_of_disagreement": sums["disagreement"] / disagreement,
            "kept": sums["kept"] / sums["tokens"],
        }
        for kind, sums in found.items()
    }


def _column(lines: list[dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([value for line in lines for value in line[name]], dtype=np.float64)
