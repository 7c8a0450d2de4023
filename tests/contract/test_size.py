"""Small files, small functions, docstrings, and nothing that runs code from a file.

Oracle: the source itself, read with `ast`, `tokenize` and regular expressions.
"""

import ast
import re
import tokenize
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "taopd"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES = 320, 450, 80
FORBIDDEN = {
    "pickle": r"^\s*(import|from) (pickle|dill|cloudpickle|shelve|marshal)\b",
    "torch.load": r"\btorch\.load\(",
    "yaml.load": r"\byaml\.(load|full_load|unsafe_load)\(",
    "remote code": r"trust_remote_code[\"']?\s*[=:]\s*True",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
    "shell": r"shell=True|os\.system\(",
    "text of others as markup": r"\bConsole\((?!.*markup=False)",
    # In a locale that is not UTF-8 a file would be read otherwise than it was written.
    "the locale's encoding": r"\.read_text\(\)|\.write_text\((?!.*encoding=)|open\([^)]*\"[rwa]\+?\"\)",
    "open end": r"\b(TODO|FIXME|XXX)\b",
}


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_length_and_name(path):
    limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FILE_LINES
    assert len(path.read_text().splitlines()) <= limit
    assert path.stem != "utils"


def definitions(path: Path):
    """Every function and class with whether it is public: reachable without an underscore."""
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), True)]
    while stack:
        node, public = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visible = public and not child.name.startswith("_")
                yield child, visible, node
                stack.append((child, visible and isinstance(child, ast.ClassDef)))
            else:
                stack.append((child, public))


def is_property(node) -> bool:
    return any(isinstance(name, ast.Name) and name.id == "property" for name in node.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path):
    for node, _, _ in definitions(path):
        if isinstance(node, ast.FunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            assert num_lines < MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_have_docstrings(path):
    assert path.read_text() == "" or ast.get_docstring(ast.parse(path.read_text())), (
        "module docstring"
    )
    for node, public, parent in definitions(path):
        # What overrides a base class's method is documented there, a property by its name and type.
        overrides = isinstance(parent, ast.ClassDef) and parent.bases
        if public and not overrides and not is_property(node):
            assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_forbidden(what):
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = [
        f"{relative(path)}: {match.group()}"
        for path in FILES
        for match in pattern.finditer(path.read_text())
    ]
    assert not found


def test_the_trainer_hides_no_call_and_no_name():
    """No function is handed a `partial` of another, and no key is put together from strings."""
    for path in (SOURCE / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{relative(path)}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                handed = [*node.args, *(keyword.value for keyword in node.keywords)]
                calls = [value.func for value in handed if isinstance(value, ast.Call)]
                names = {getattr(function, "id", None) for function in calls}
                allowed = isinstance(node.func, ast.Name) and node.func.id in ("Ranks",)
                assert "partial" not in names or allowed, where
            if isinstance(node, ast.Subscript):
                assert not isinstance(node.slice, ast.JoinedStr), where


COMMENTED = {"trainer": 0.03, "selectors": 0.03, "models": 0.03}
"""Rooms in which a reader meets surprises, and the share of their lines that says why."""


@pytest.mark.parametrize("room", COMMENTED)
def test_the_rooms_that_train_say_why(room):
    lines = comments = 0
    for path in (SOURCE / room).rglob("*.py"):
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
        lines += len(path.read_text().splitlines())
    assert comments >= COMMENTED[room] * lines, f"{room}: {comments} of {lines}"
