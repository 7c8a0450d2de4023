"""The rooms of the package: which may import which, and what none may do.

Oracle: the imports as written, read with `ast`, at the top of a file or inside a function. A new room must be
given its place in `ROOMS`.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "taopd"
ROOMS = (
    {"errors"},
    {"runs", "distributed", "kernels"},
    {"signals"},
    {"selectors", "losses"},
    {"models"},
    {"teachers"},
    {"trainer"},
    {"preflight", "diagnose", "experiments", "integrations"},
    {"report"},
    {"cli"},
)
"""Lowest first. A room imports itself and the rooms below it, none beside it."""
NO_TORCH = {"runs", "report", "errors"}
PLAIN_TENSORS = {"distributed", "kernels", "signals", "selectors", "losses"}
"""They know no model, file or config."""
TRL = {"trainer", "experiments"}
"""experiments: public names only, for SFT."""
SAME_NAME = {"__init__", "__main__", "settings", "base"}
NAMED_AFTER = ("cli/", "report/figures/", "report/sections/", "integrations/")
"""Folders whose files bear the name of what they run or show, and so may repeat it."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def module(path: Path) -> str:
    parts = ("taopd", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def room(path: Path) -> str:
    """The entry directly below `taopd` that a file belongs to; "" for those of `taopd` itself."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first in ("__init__.py", "__main__.py") else first.removesuffix(".py")


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Dotted names that a file imports, wherever in it; `at_run_time` leaves out `if TYPE_CHECKING`."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        only_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (only_types and at_run_time):
            stack += ast.iter_child_nodes(node)
    return found


def targets(path: Path, **options: bool) -> set[str]:
    """The modules of the package that a file imports."""
    found: set[str] = set()
    for name in imports(path, **options):
        if name.partition(".")[0] == "taopd":
            parent = name.rpartition(".")[0]
            found.add(name if name in MODULES else parent if parent in MODULES else "taopd")
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path):
    own = room(path)
    if own == "":
        return  # __init__ names public names from whatever room, __main__ the command line.
    assert own in LEVEL, f"give {own} a place in {Path(__file__).name}"
    for target in targets(path):
        other = room(MODULES[target])
        assert other in ("", own) or LEVEL[other] < LEVEL[own], f"{own} must not import {target}"


def test_versions_are_asked_for_in_one_place():
    """Run from its sources taopd has no metadata, and a question for it anywhere else ends in a traceback."""
    root = SOURCE.parents[1]
    files = [*FILES, *(root / "benchmarks").rglob("*.py"), *(root / "scripts").rglob("*.py")]
    asking = {
        str(path.relative_to(root))
        for path in files
        if any(name.startswith("importlib.metadata") for name in imports(path))
    }
    # The audit compares what is installed with the pins, and asks for these alone.
    assert asking == {"src/taopd/runs/versions.py", "scripts/audit.py"}


def test_no_circles():
    """Not even between the files of a room, or by an import inside a function."""
    graph = {name: targets(path, at_run_time=True) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        if name != "taopd":  # It imports lazily, and anything may ask it for the version.
            walk(name, ())


def test_no_module_name_twice():
    own = [path for path in FILES if not relative(path).startswith(NAMED_AFTER)]
    names = Counter(path.stem for path in own if path.stem not in SAME_NAME)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_stay_where_they_belong(path):
    libraries = {name.partition(".")[0] for name in imports(path)}
    if room(path) in NO_TORCH:
        assert not libraries & {"torch", "transformers", "trl"}
    if room(path) in PLAIN_TENSORS:
        assert not libraries & {"transformers", "trl", "datasets", "peft"}
    if "trl" in libraries:
        assert room(path) in TRL


def test_the_top_of_the_package_has_one_entry_a_room():
    entries = {path.name for path in SOURCE.iterdir() if not path.name.startswith(("__", "."))}
    assert entries - {"py.typed", "errors.py"} == set(LEVEL) - {"errors"}


def test_the_walk_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from taopd.losses import a\n    import taopd.cli\nfrom taopd import __version__\n"
    )
    assert targets(file) == {"taopd.losses", "taopd.cli", "taopd"}
