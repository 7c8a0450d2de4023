"""What a stranger must not meet in a message: names from inside the program, and numbers without a unit.

`templates` collects the texts that the package can say, from its source; `inside_names` and `bare_numbers`
judge a text. A snake_case word must be something that a user can write or see: a setting, a flag, a column, a
file, a metric.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "taopd"
ROOMS = (
    "runs",
    "models",
    "teachers",
    "trainer",
    "preflight",
    "diagnose",
    "experiments",
    "report",
    "cli",
)
"""Those whose messages reach somebody who has not called a function."""
SAYS = ("warn", "fail", "warning", "info", "judge", "require", "_warn", "warn_once")
_ERROR = re.compile(r"[A-Z]\w*Error$")
JARGON = re.compile(
    r"\b(impl|chunked|kernel|kwargs|dataclass|NoneType|isinstance|__\w+__|self\.\w+|tensor_\w+)\b"
)
_SNAKE = re.compile(r"(?<![\w./<{-])_?[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w(])")
_NUMBER = re.compile(r"(?<![\w.#'\"(-])[-+]?\d(?:[\d,.]*\d)?(?:e[-+]?\d+)?(?![\w'\"])")
UNITS = re.compile(
    r"^\s?(%|tokens?\b|nats\b|rows?\b|ids?\b|MiB|GiB|s\b|characters\b|prompts?\b|problems?\b|completions?\b"
    r"|steps?\b|token ids\b|to \d|/ |, |of the \d|of \d|or more|processes\b|ends\b|and \d|points\b)"
)


def templates() -> Iterator[tuple[str, str]]:
    """(place, text) of every message in the source; what is filled in stands as {}."""
    for room in ROOMS:
        for path in sorted((SOURCE / room).rglob("*.py")):
            place = path.relative_to(SOURCE).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _says(node.func):
                    for argument in [*node.args, *(each.value for each in node.keywords)]:
                        for text in _texts(argument):
                            yield f"{place}:{node.lineno}", text


def inside_names(text: str, known: frozenset[str]) -> list[str]:
    """Words that only somebody who reads the source can know."""
    found = [match.group() for match in JARGON.finditer(text)]
    return found + [
        word for word in _SNAKE.findall(text) if word not in known and not word.startswith("test_")
    ]


def bare_numbers(text: str) -> list[str]:
    """Numbers of a measurement after which no unit comes; quoted ones and ids in brackets are names."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^()]*\)", "", text)
    return [
        match.group()
        for match in _NUMBER.finditer(plain)
        if not UNITS.match(plain[match.end() :]) and not _counted(plain[: match.start()])
    ]


def _counted(before: str) -> bool:
    """The unit may stand before the number: "row 3", "seed 0", "top 4"."""
    return bool(re.search(r"\b(row|line|step|seed|top|id|on|setting|=)\s?$", before))


def _says(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in SAYS or bool(_ERROR.match(name))


def _texts(node: ast.expr) -> Iterator[str]:
    """The texts of an argument, each whole: the parts of an f-string are one text."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _texts(child)
