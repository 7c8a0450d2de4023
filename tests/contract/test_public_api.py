"""The public surface: what is exported exists, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import taopd

SOURCE = Path(taopd.__file__).parent


def packages() -> list[str]:
    """Every package that says what it exports; verl's adapter needs verl."""
    found = []
    for path in sorted(SOURCE.rglob("__init__.py")):
        name = ".".join(("taopd", *path.relative_to(SOURCE).parts[:-1]))
        names = [
            target.id
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        if "__all__" in names and "verl" not in name:
            found.append(name)
    return found


@pytest.mark.parametrize("name", packages())
def test_exports_exist_and_are_sorted(name):
    module = import_module(name)
    assert [export for export in module.__all__ if not hasattr(module, export)] == []
    assert sorted(module.__all__) == sorted(set(module.__all__))


def test_the_packages_that_people_import_export_something():
    named = ["kernels", "losses", "selectors", "signals", "teachers", "trainer", "experiments.lab"]
    assert {f"taopd.{name}" for name in named} <= set(packages())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = taopd.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = import_module("taopd.trainer").nothing


@pytest.mark.parametrize(("old", "new"), sorted(taopd._MOVED.items()))
def test_import_paths_of_the_old_documentation_still_work(old, new):
    moved, home = import_module(old), import_module(new)
    public = [name for name in vars(home) if not name.startswith("_")]
    assert public and all(getattr(moved, name) is getattr(home, name) for name in public)
    assert getattr(taopd, old.partition(".")[2]) is moved
    with pytest.raises(AttributeError, match="nothing"):
        _ = moved.nothing


def test_an_old_path_can_be_imported_first():
    """In a process that has loaded neither."""
    code = (
        "from taopd.data import load_prompts; from taopd import live; import taopd;"
        "print(load_prompts is taopd.load_prompts, live.attach.__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True taopd.trainer.tracker_tables"


def test_importing_the_package_loads_no_torch():
    code = "import sys, taopd; print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
