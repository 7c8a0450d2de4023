r"""Graders of completions: exact text, a regular expression, or mathematics (math-verify).

`Grader` is made once per evaluation and called per completion. "auto" decides per problem:
mathematics where the gold answer parses as a number or is written in LaTeX, exact text elsewhere
("yes", "B", a name), of the whole completion or of its last \boxed{...}. Both read what stands in the
last <answer>...</answer> where there is one, and of a worked solution whose last line is "#### 42", as
GSM8K has them, what stands in that line.

Patterns are those of the package `regex`, which gives up on a slow one; Python's own would hang.

math-verify guards against runaway expressions with a timer signal, which exists in the main thread
only; in another thread it runs without one. An expression that it cannot parse counts as wrong, and
as unparsed.
"""

import logging
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex

from taopd.errors import ConfigError, suggest
from taopd.experiments.evaluation.written_numbers import DOLLARS, LATEX, apart, bare_latex, plainly
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document

_TIMEOUT_SECONDS = 5
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_WORD = re.compile(r"[^\W\d_]{2}")
_OPERATOR = re.compile(r"[-+*^=(){}<>\[\]]")
_NUMBER = re.compile(r"(?=.*\d)[-+]?(\d{1,3}(,\d{3})+|\d*)([.,]\d*)?(\s*/\s*\d+)?\s*%?")
"""One number. Of a date or an address math-verify would read the first two parts and pass over the rest."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_LIST = re.compile(r"(?<![\d.])[-+]?\d[\d.]*(\s*,\s*[-+]?\d[\d.]*)+")
_TUPLE = re.compile(r"[(\[]\s*[-+]?[\d./]+(?:\s*,\s*[-+]?[\d./]+)+\s*[)\]]")
_PARTS = re.compile(r"(?<!\d)(?:\d+(?::\d+)+|\d+([-./])\d+(?:\1\d+)+)")
"""A time, a date, a version or an address: text, of which math-verify would read the first number."""
_SMALL = re.compile(r"[-+]?0*\.(0{4,})\d")
"""A number that six decimals, to which math-verify rounds, would change."""
_ENCLOSED = re.compile(r"(?<![\w)])[\"'(\[+]{1,3}(?=[-.\d])")
_EXACT = 2**53
"""From here on a float is no longer one whole number."""
_FINAL = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*$")
"""The last line of a solution in GSM8K's form."""
_ANSWERED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
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
        if self.match == "exact":
            return Verdict(completion.strip() == answer.strip(), True)
        final, completion = _final(answer), _answered(completion)
        if _is_copy(completion, final):
            return Verdict(True, True)
        in_a_box = bool(_BOX.search(completion)) and not _is_text(final)
        if self.match == "math" or in_a_box or is_mathematical(final):
            return _grade_math(completion, final)
        return Verdict(_final(completion) == final, True)


def answer_text(answer: object) -> str:
    """An answer as a completion writes it: 3 of a table that holds it as 3.0."""
    whole = isinstance(answer, float) and answer.is_integer() and abs(answer) < _EXACT
    return str(int(answer)) if whole else str(answer)  # type: ignore[call-overload]


def _final(text: str) -> str:
    found = _FINAL.search(text)
    return found.group(1) if found else text.strip()


def _answered(completion: str) -> str:
    """What stands in the last <answer>...</answer>, as models of reasoning end; else all of it."""
    found = _ANSWERED.findall(completion)
    return found[-1] if found else completion


def is_mathematical(answer: str) -> bool:
    r"""Whether an answer is a number or LaTeX that math-verify can parse.

    Example:
        >>> is_mathematical("34"), is_mathematical(r"\frac{1}{2}"), is_mathematical("yes")
        (True, True, False)
    """
    answer = plainly(answer.strip())
    return bool(
        (
            _NUMBER.fullmatch(answer)
            or _is_list(answer)
            or _TUPLE.fullmatch(answer)
            or LATEX.search(answer)
        )
        and _parse_answer(answer, _timeout())
    )


def count_as_text(answers: Iterable[str]) -> int:
    """How many answers "auto" compares as text: a completion has to be such an answer to the letter."""
    return sum(not is_mathematical(_final(answer)) for answer in answers)


def _is_copy(completion: str, answer: str) -> bool:
    r"""Whether a completion, or its last \boxed{...}, is the answer to the letter.

    math-verify reads no \text{yes} without dollars, and takes a word for a product of letters.
    """
    box = "".join(_BOX.findall(completion)[-1:])
    return answer.strip() in (completion.strip(), box.strip(), _TEXT.sub(r"\1", box).strip())


def _is_text(answer: str) -> bool:
    """Whether an answer is text to math-verify, which would read "listen" as a product of letters."""
    return bool(_PARTS.fullmatch(answer.strip())) or bool(
        _WORD.search(answer) and not LATEX.search(answer)
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

    if _PARTS.fullmatch(answer.strip()):
        parts = [found.group() for found in _PARTS.finditer(completion)]
        return Verdict(parts[-1:] == [answer.strip()], bool(parts))
    timeout = _timeout()
    gold = _parse_answer(answer, timeout)
    try:
        found = _parse_completion(bare_latex(plainly(apart(completion))), answer, timeout)
        if not found or not gold:
            return Verdict(False, bool(found))
        small = _SMALL.match(plainly(answer.strip()))
        decimals = len(small[1]) + 3 if small else 6
        right = math_verify.verify(
            list(gold), found, float_rounding=decimals, timeout_seconds=timeout
        )
        return Verdict(bool(right), True)
    # math-verify lets every kind of sympy's exceptions through; its timeout is a BaseException.
    except (Exception, TimeoutException) as error:
        logging.getLogger(__name__).debug("math-verify failed on %r: %s", completion[-200:], error)
        return Verdict(False, False)


def _parse_completion(completion: str, answer: str, timeout: int | None) -> list[Any]:
    import math_verify

    lists = [found.group() for found in _LIST.finditer(completion)]
    if lists and _is_list(answer.strip()) and not DOLLARS.search(completion):
        last = lists[-1].rstrip(".")  # As plain text one number of it would be read.
        if last.count(",") != answer.count(","):
            return [last]
        return list(math_verify.parse(f"${last}$", parsing_timeout=timeout))
    tuples = _TUPLE.findall(completion) if _TUPLE.fullmatch(answer.strip()) else []
    if tuples and not DOLLARS.search(completion):
        return list(math_verify.parse(f"${tuples[-1]}$", parsing_timeout=timeout))
    found = math_verify.parse(completion, parsing_timeout=timeout)
    if all(isinstance(one, str) for one in found):
        found = math_verify.parse(_ENCLOSED.sub(" ", completion), parsing_timeout=timeout) or found
    return list(found)


@lru_cache(maxsize=16_384)
def _parse_answer(answer: str, timeout: int | None) -> tuple[Any, ...]:
    """The gold answer parsed by math-verify; a formula without dollar signs is put between them first."""
    import math_verify
    from math_verify.errors import TimeoutException

    answer = plainly(answer.strip()).removeprefix("+")
    as_latex = f"${answer}$"
    number = bool(_NUMBER.fullmatch(answer))
    # As plain text the first number of a formula is read, and the rest is passed over.
    formula = bool(_OPERATOR.search(answer.removeprefix("-"))) and not number
    if DOLLARS.search(answer) or _is_text(answer):
        readings = [answer]
    elif _is_list(answer):
        readings = [answer, as_latex] if number else [as_latex]
    else:
        readings = [as_latex] if "\\" in answer or formula else [answer]
    try:
        parsed = [
            found for text in readings for found in math_verify.parse(text, parsing_timeout=timeout)
        ]
        if not parsed and not _is_text(answer):
            parsed = math_verify.parse(as_latex, parsing_timeout=timeout)
        return tuple(parsed)
    except (Exception, TimeoutException) as error:  # as in `_grade_math`
        logging.getLogger(__name__).debug("math-verify failed on the answer %r: %s", answer, error)
        return ()


def _timeout() -> int | None:
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
