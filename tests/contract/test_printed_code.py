"""Python blocks of README and guides run; flags and files of every printed command exist.

The blocks of a page run in order, in one namespace, on the micro models: the names in `SMALL` are all that is
replaced. `scripts/run_docs.py` runs the commands themselves (`make test-docs`).
"""

import re
import shlex
from functools import cache

import pytest

from scripts.run_docs import ELSEWHERE, PAGES, ROOT, Line, lines, run, summary
from scripts.site.reference import help_page
from taopd.selectors import SELECTORS

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCES = [
    path
    for path in [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
    if BLOCK.search(path.read_text())
]
"""README's block has a test of its own, test_docs.py."""
NOT_HERE = {
    'teachers = {"math": model_or_path, "code": "http://localhost:8000"}': "asks a server",
}
"""First line of a block that needs a GPU or a server, and why; it is compiled only."""
ON_A_CPU = "bf16=False, use_cpu=True, gradient_checkpointing=False, max_steps=1, score_top_k=4"


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page, micro_lab, tmp_path, monkeypatch):
    from datasets import Dataset

    from taopd import TeachabilityConfig, load_prompts

    small = {
        '"Qwen/Qwen3-1.7B"': repr(str(micro_lab.student)),
        '"Qwen/Qwen3-4B"': repr(str(micro_lab.teacher)),
        "max_completion_length=1024": "max_completion_length=6, per_device_train_batch_size=2",
        'TeachabilityConfig(output_dir="runs/x"': f'TeachabilityConfig(output_dir="runs/x", {ON_A_CPU}',
        'DistillationConfig(output_dir="runs/x"': 'DistillationConfig(output_dir="runs/x", '
        + ON_A_CPU.removesuffix(", score_top_k=4"),
    }
    monkeypatch.chdir(tmp_path)
    known = set(SELECTORS)
    question = [{"role": "user", "content": "1 + 1 ="}]
    namespace = {
        "rows": Dataset.from_list([{"prompt": question}]),
        "RULES": "Answer with a digit.",
        "prompts": load_prompts(micro_lab.prompts, split="train"),
        "TeachabilityConfig": TeachabilityConfig,
    }
    try:
        for block in BLOCK.findall(page.read_text()):
            for printed, ours in small.items():
                block = block.replace(printed, ours)
            code = compile(block, page.name, "exec")
            if block.splitlines()[0] not in NOT_HERE:
                exec(code, namespace)
    finally:
        for name in set(SELECTORS) - known:
            SELECTORS.pop(name)
    if page.name == "guide.md":
        assert namespace["trainer"].state.global_step == 1
        assert namespace["args"].selector == "surprising"


@cache
def accepted(words: tuple[str, ...]) -> set[str]:
    """Flags of a command, those of its settings included."""
    from dataclasses import fields

    from trl import ModelConfig, ScriptArguments

    from taopd.trainer.config import TeachabilityConfig

    found = set(re.findall(r"--[\w-]+", help_page(list(words))))
    if words[0] in ("train", "check", "plan"):
        kinds = (TeachabilityConfig, ScriptArguments, ModelConfig)
        found |= {f"--{each.name}" for kind in kinds for each in fields(kind)}
    return found


def taopd_lines() -> list[Line]:
    return [line for line in lines() if re.match(r"taopd \w", line.command)]


@pytest.mark.parametrize("line", taopd_lines(), ids=lambda line: line.command[:60])
def test_flags_and_files_of_a_printed_command_exist(line):
    words = shlex.split(line.command)[1:]
    name = tuple(words[: 2 if words[0] == "diagnose" else 1])
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= accepted(name), f"{line.page}: {line.command}"
    for file in re.findall(r"(?:recipes|tests|examples)/[\w./-]+", line.command):
        assert (ROOT / file).is_file(), f"{line.page}: {file}"


def test_every_line_runs_or_has_a_reason(tmp_path, capsys):
    chosen = lines()
    assert {line.page for line in chosen} >= {"README.md", "docs/guide.md", "docs/tasks.md"}
    assert len([line for line in chosen if not line.reason]) > 25
    printed = {reason for line in chosen if (reason := line.reason)}
    assert printed >= set(ELSEWHERE.values()), "a reason that no line has"
    shown = [Line("a", "true", ""), Line("b", "false", ""), Line("c", "false", "not here")]
    assert run(shown, tmp_path) == 1
    assert "false  FAILED with 1, b" in capsys.readouterr().out
    told = summary(shown, failed=1).splitlines()
    assert told == ["2 lines ran, 1 failed; 1 did not run here:", "    1  not here"]


def test_the_ten_tasks_have_commands():
    text = (ROOT / "docs/tasks.md").read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 10 and "docs/tasks.md" in PAGES
    assert all("```\n" in section for section in sections) and "2605.26844" in sections[-1]


def test_a_block_that_does_not_run_is_printed_somewhere():
    printed = {
        block.splitlines()[0] for page in SOURCES for block in BLOCK.findall(page.read_text())
    }
    assert set(NOT_HERE) <= printed


def test_readme_lines_are_short():
    assert max(map(len, (ROOT / "README.md").read_text().splitlines())) <= 120
