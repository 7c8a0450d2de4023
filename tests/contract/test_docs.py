"""README and guides do what they say: README's code runs, commands exist, linked files are there."""

import re
from pathlib import Path

import pytest

from taopd.cli import COMMANDS
from taopd.errors import ConfigError
from tests.contract.test_math import find

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FILE = r"`((?:src|tests|scripts|benchmarks|recipes|docs)/[\w./-]+|[\w/]+\.py)(?:::(\w+))?`"
"""A path from the root, or a file of the package, and perhaps something that is defined in it."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_example_trains(micro_lab, tmp_path, monkeypatch):
    """As printed, but on the micro models: `build_lab` is the only thing replaced."""
    import taopd.experiments.lab

    class Lab:
        student, teacher, prompts = micro_lab.student, micro_lab.teacher, micro_lab.prompts
        top_k, max_completion_length = 4, 6

    monkeypatch.setattr(taopd.experiments.lab, "build_lab", lambda variant: Lab)
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    example = example.replace("max_steps=50", "max_steps=2").replace("=64", "=8")
    namespace: dict = {}
    exec(example, namespace)
    assert namespace["trainer"].state.global_step == 2
    assert len(example.splitlines()) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for command in re.findall(r"^\s*(?:\S+/)?taopd (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, f"{page.name} shows taopd {command}"
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", text):
        assert (ROOT / recipe).exists(), f"{page.name} names {recipe}"


def broken(page: Path) -> list[str]:
    """What a page names and is not there: linked files and headings, paths, definitions, dotted names."""
    text, wrong = page.read_text(), []
    for label, name, anchor in re.findall(r"\[([^]]*)\]\(([^)\s#:]*)(?:#([\w-]+))?\)", text):
        file = page.parent / name if name else page
        titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        other = label.endswith(".py") and not name.endswith(label)
        if not file.exists() or other or (anchor and anchor not in anchors):
            wrong.append(f"[{label}]({name}#{anchor})")
    for name, definition in re.findall(FILE, text):
        files = [base / name for base in (ROOT, ROOT / "src/taopd") if (base / name).exists()]
        files += list((ROOT / "tests").rglob(name)) if name.startswith("test_") else []
        defined = rf"^ *(def|class) {definition}\b"
        if not files or (definition and not re.search(defined, files[0].read_text(), re.MULTILINE)):
            wrong.append(f"{name}::{definition}")
    for name in re.findall(r"`(?:python -m )?taopd\.((?!json)[\w.]*\w)", text):
        try:
            find(name)
        except ConfigError:
            pass  # An adapter whose library is not installed here.
        except (AttributeError, ModuleNotFoundError):
            wrong.append(f"taopd.{name}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_paths_and_dotted_names_lead_somewhere(page):
    assert broken(page) == []


def test_a_wrong_link_path_or_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[a](page.md#a-b) `errors.py::ConfigError` `taopd.signals.types`")
    assert broken(page) == []
    page.write_text("[a](#c) [x.py](page.md) [b](no.md) `src/no` `errors.py::No` `taopd.no`")
    assert len(broken(page)) == 6


def test_changelog_and_version_agree():
    import taopd

    assert f"## {taopd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{taopd.__version__}"' in (ROOT / "pyproject.toml").read_text()
