"""The layer order of the package. Oracle: the imports as written, read with `ast`.

A module may import its own layer and the layers below, at the top or inside a function. Two
packages of one layer may be kept apart (`APART`). A new module must be given a layer here.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "taopd"
LAYERS = (
    {
        "",
        "errors",
    },
    {
        "distributed",
        "kernels",
        "losses",
        "runs",
        "selectors",
        "signals",
    },
    {
        "bank",
        "models",
        "teachers",
    },
    {
        "diagnose",
        "integrations",
        "preflight",
        "trainer",
    },
    {
        "experiments",
        "stacked",
        "study",
        "tinylab",
    },
    {
        "cli",
        "report",
    },
)
APART = ({"selectors", "losses"},)
TORCH_FREE = {"report", "errors", "runs"}
TRL_ONLY = {"trainer", "cli"}

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def owner(path: Path) -> str:
    """The module or package directly below `taopd` that a file belongs to; "" for `taopd`."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def targets(path: Path) -> set[str]:
    """The modules below `taopd` that a file imports; a name of the package itself is ""."""
    modules = {relative(file).split("/")[0].removesuffix(".py") for file in FILES}
    below = [name.split(".")[1:2] for name in imports(path) if name.split(".")[0] == "taopd"]
    return {names[0] if names and names[0] in modules else "" for names in below}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path):
    own = owner(path)
    assert own in LEVEL, f"give {own} a layer in {Path(__file__).name}"
    for target in targets(path):
        assert target in LEVEL, f"{own} imports taopd.{target}, which has no layer"
        # The package's own __init__ re-exports the public names, from whatever layer.
        assert own == "" or LEVEL[target] <= LEVEL[own], f"{own} must not import {target}"
        assert own == target or {own, target} not in APART, f"{own} must not import {target}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_stay_where_they_belong(path):
    libraries = {name.partition(".")[0] for name in imports(path)}
    if owner(path) in TORCH_FREE:
        assert not libraries & {"torch", "transformers", "trl"}
    if LEVEL[owner(path)] == 1:
        assert not libraries & {"transformers", "trl", "datasets"}
    if "trl" in libraries:
        assert owner(path) in TRL_ONLY


def test_the_walk_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from taopd.losses import a\n    import taopd.cli\nfrom taopd import __version__\n"
    )
    assert targets(file) == {"losses", "cli", ""}


def test_every_layer_name_is_used_once():
    assert sum(map(len, LAYERS)) == len(LEVEL)
