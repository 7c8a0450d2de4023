"""docs/math.md and docs/released-code.md name functions and tests that exist.

Oracle: the package, imported; the tests as written.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "\n\n".join((ROOT / "docs" / name).read_text() for name in ("math.md", "released-code.md"))
FUNCTIONS = sorted(set(re.findall(r"`((?:[a-z_]+\.)+(?!py`)[A-Za-z_]+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT)))


def find(name: str) -> object:
    """What a dotted name below `taopd` stands for: a module, or something in one."""
    parts = name.split(".")
    for size in range(len(parts), -1, -1):
        path = ".".join(["taopd", *parts[:size]])
        try:
            found: object = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_formulas_exists(name):
    assert find(name) is not None


@pytest.mark.parametrize(("file", "test"), TESTS, ids=lambda value: value)
def test_a_test_of_the_formulas_exists(file, test):
    (path,) = (ROOT / "tests").rglob(file)
    assert not test or f"def {test}(" in path.read_text()


def test_every_row_of_a_formula_names_a_function():
    """Tables that have a column "function" have a name from the package in it, or "the same"."""
    assert len(FUNCTIONS) > 40 and len(TESTS) > 10
    place = None
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            place = None
        elif "function" in cells:
            place = cells.index("function")
        elif place is not None and not set(cells[0]) <= {"-", ":"}:
            assert re.search(r"`\w+(\.\w+)+`|the same|registered", cells[place]), line
