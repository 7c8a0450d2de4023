"""Graders of completions: exact text, a regular expression, or mathematics (math-verify).

`Grader` is made once per evaluation and called per completion. "auto" decides per problem:
mathematics where the gold answer parses as a number or is written in LaTeX, exact text elsewhere
("yes", "B", a name). Of a worked solution whose last line is "#### 42", as GSM8K has them, both read what
stands in that line.

Patterns are those of the package `regex`, which gives up on a slow one; Python's own would hang.

math-verify guards against runaway expressions with a timer signal, which exists in the main thread
only; in another thread it runs without one. An expression that it cannot parse counts as wrong, and
as unparsed.
"""

import logging
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex

from taopd.errors import ConfigError, suggest
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document

_TIMEOUT_SECONDS = 5
_LATEX = re.compile(r"\\|\$")
_NUMBER = re.compile(r"(?=.*\d)[-+]?(\d{1,3}(,\d{3})+|\d*)([.,]\d*)?(\s*/\s*\d+)?\s*%?")
"""One number. Of a date or an address math-verify would read the first two parts and pass over the rest."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_LIST = re.compile(r"[-+]?\d[\d.]*(,\d[\d.]*)+")
_FINAL = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*$")
"""The last line of a solution in GSM8K's form."""
_REGEX_PREFIX = "regex:"
LAB_FILE = "lab.json"
"""What a lab of ours holds beside its prompts."""
_MATCHES = ("auto", "exact", "math", "regex:PATTERN")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of one completion."""

    correct: bool
    parsed: bool
    """False if the completion holds nothing that could be compared with the answer."""


def grading_of(dataset: object) -> str:
    """How the answers of a dataset are graded: by its lab's pattern beside a lab's prompts, else "auto"."""
    # os.path: a hub id may be longer than any path.
    if not isinstance(dataset, str | Path) or not os.path.isfile(dataset):
        return "auto"
    beside = Path(dataset).with_name(LAB_FILE)
    pattern = read_document(beside, OBJECT).get("answer_pattern") if beside.is_file() else None
    return f"{_REGEX_PREFIX}{pattern}" if isinstance(pattern, str) else "auto"


class Grader:
    """Compares completions with answers.

    Args:
        match: "exact" (equal up to surrounding whitespace), "math", "regex:PATTERN" (all matches,
            or their groups, joined and compared with the answer without whitespace), or "auto".

    Raises:
        ConfigError: unknown `match`, or a pattern that does not compile.

    Example:
        >>> Grader("regex:[0-9]")("a 1 b 2", "12").correct
        True
        >>> Grader("exact")("yes ", "yes").correct
        True
    """

    def __init__(self, match: str = "auto") -> None:
        self.match = match
        self._pattern: regex.Pattern[str] | None = None
        if match == _REGEX_PREFIX:
            raise ConfigError(f"match={match!r}: the pattern is empty; write it behind the colon")
        if match.startswith(_REGEX_PREFIX):
            try:
                self._pattern = regex.compile(match.removeprefix(_REGEX_PREFIX))
            except regex.error as error:
                raise ConfigError(
                    f"match={match!r}: the pattern does not compile ({error})"
                ) from error
        elif match not in _MATCHES:
            raise ConfigError(f"match={match!r} is unknown.{suggest(match, _MATCHES)}")

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Grade one completion against the gold answer."""
        if self._pattern is not None:
            return _grade_regex(self._pattern, completion, answer)
        if self.match != "exact":
            final = _final(answer)
            if self.match == "math" or is_mathematical(final):
                return _grade_math(completion, final)
            return Verdict(_final(completion) == final, True)
        return Verdict(completion.strip() == answer.strip(), True)


def _final(text: str) -> str:
    found = _FINAL.search(text)
    return found.group(1) if found else text.strip()


def is_mathematical(answer: str) -> bool:
    r"""Whether an answer is a number or LaTeX that math-verify can parse.

    Example:
        >>> is_mathematical("34"), is_mathematical(r"\frac{1}{2}"), is_mathematical("yes")
        (True, True, False)
    """
    answer = answer.strip()
    return bool(
        (_NUMBER.fullmatch(answer) or _is_list(answer) or _LATEX.search(answer))
        and _parse_answer(answer, _timeout())
    )


def _is_list(answer: str) -> bool:
    """Whether an answer may be numbers between commas; with one comma it may be a decimal as well."""
    return bool(_LIST.fullmatch(answer)) and not _THOUSANDS.fullmatch(answer)


def _grade_regex(pattern: regex.Pattern[str], completion: str, answer: str) -> Verdict:
    try:
        found = [
            match.groups(default="") if pattern.groups else (match.group(),)
            for match in pattern.finditer(completion, timeout=_TIMEOUT_SECONDS)
        ]
    except TimeoutError as error:
        raise ConfigError(
            f"match='regex:{pattern.pattern}' takes more than {_TIMEOUT_SECONDS} s on a completion of "
            f"{len(completion)} characters: repeats within repeats, as (a+)+, try every division of the "
            "text; write the pattern without them"
        ) from error
    joined = _squeeze("".join("".join(groups) for groups in found))
    # [0-9]* matches between any two letters, and finds nothing there.
    return Verdict(bool(joined) and joined == _squeeze(answer), bool(joined))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _grade_math(completion: str, answer: str) -> Verdict:
    import math_verify
    from math_verify.errors import TimeoutException

    if completion.strip() == answer.strip():
        return Verdict(True, True)  # math-verify reads no \text{yes} without dollars.
    timeout = _timeout()
    gold = _parse_answer(answer, timeout)
    try:
        found = math_verify.parse(completion, parsing_timeout=timeout)
        if not found or not gold:
            return Verdict(False, bool(found))
        return Verdict(bool(math_verify.verify(list(gold), found, timeout_seconds=timeout)), True)
    # math-verify lets every kind of sympy's exceptions through; its timeout is a BaseException.
    except (Exception, TimeoutException) as error:
        logging.getLogger(__name__).debug("math-verify failed on %r: %s", completion[-200:], error)
        return Verdict(False, False)


@lru_cache(maxsize=16_384)
def _parse_answer(answer: str, timeout: int | None) -> tuple[Any, ...]:
    """The gold answer parsed by math-verify; bare LaTeX is put between dollar signs first."""
    import math_verify
    from math_verify.errors import TimeoutException

    bare_latex = "\\" in answer and "$" not in answer and "\\boxed" not in answer
    readings = [f"${answer}$" if bare_latex else answer]
    if _is_list(answer.strip()):
        # As plain text the first two numbers are read as one decimal, and the rest is passed over.
        decimal = readings if _NUMBER.fullmatch(answer.strip()) else []
        readings = [*decimal, f"${answer}$"]
    try:
        return tuple(
            found for text in readings for found in math_verify.parse(text, parsing_timeout=timeout)
        )
    except (Exception, TimeoutException) as error:  # as in `_grade_math`
        logging.getLogger(__name__).debug("math-verify failed on the answer %r: %s", answer, error)
        return ()


def _timeout() -> int | None:
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
