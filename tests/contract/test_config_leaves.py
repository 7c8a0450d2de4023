"""Every setting is read somewhere and named on a page: no option that is parsed and ignored, or not known."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from trl import DistillationConfig

from taopd.experiments.study.file import StudyFile
from taopd.trainer.config import TeachabilityConfig

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "taopd"
PAGES = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
OURS = sorted(
    {f.name for f in fields(TeachabilityConfig)} - {f.name for f in fields(DistillationConfig)}
)


@cache
def attributes_read() -> set[str]:
    """Names read as `something.name` outside the files that declare and check them."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("config.py", "config_checks.py"):
            tree = ast.walk(ast.parse(path.read_text()))
            found |= {node.attr for node in tree if isinstance(node, ast.Attribute)}
    return found


@pytest.mark.parametrize("name", OURS)
def test_setting_is_read_and_has_help(name):
    field = next(f for f in fields(TeachabilityConfig) if f.name == name)
    assert field.metadata.get("help"), f"{name} has no help text"
    if (
        name != "num_generations"
    ):  # Read inside config_checks.check_generation_batch and by the sampler.
        assert name in attributes_read(), f"no module reads {name}"


@pytest.mark.parametrize("name", [*OURS, *(entry.name for entry in fields(StudyFile))])
def test_setting_is_named_on_a_page(name):
    assert re.search(rf"`[^`]*\b{name}\b|^{name}:", PAGES, re.MULTILINE), f"no page names {name}"


def test_changed_settings_reach_the_resolved_dump(tmp_path):
    changed = {
        "selector": "tip",
        "budget": 0.3,
        "anchor_coef": 0.5,
        "loss": "forward_kl",
        "min_keep": 2,
    }
    config = TeachabilityConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **changed)
    assert changed.items() <= config.to_dict().items()
