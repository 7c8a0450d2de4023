"""README and guide do what they say: code runs, commands exist, linked files are there."""

import re
from pathlib import Path

import pytest

from taopd.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_the_guides_selector_registers_and_selects(monkeypatch):
    from taopd.selectors import SELECTORS

    (example,) = [
        block for block in blocks(ROOT / "docs/guide.md", "python") if "register" in block
    ]
    namespace: dict = {}
    try:
        exec(example.replace("output_dir=", "bf16=False, use_cpu=True, output_dir="), namespace)
        assert namespace["args"].selector == "surprising"
    finally:
        SELECTORS.pop("surprising", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for command in re.findall(r"^\s*(?:\S+/)?taopd (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, f"{page.name} shows taopd {command}"
    for recipe in re.findall(r"recipes/[\w./-]+\.yaml", text):
        assert (ROOT / recipe).exists(), f"{page.name} names {recipe}"


def test_changelog_and_version_agree():
    import taopd

    assert f"## {taopd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{taopd.__version__}"' in (ROOT / "pyproject.toml").read_text()
