"""The sources of the documentation site: whole, linked, and made from the code.

Oracles: the dataclasses, the metrics, the commands and the files themselves. `make docs` builds the site.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import DistillationConfig

from scripts.site import reference, settings
from scripts.site.build import write_site
from scripts.site.nav import NAV, navigation
from scripts.site.offline import fetched
from scripts.site.places import ROOT, SPLIT, headings, pieces, slug, without_code
from taopd.trainer.config import TeachabilityConfig


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_site(folder)
    return folder


def test_every_page_is_in_the_navigation_once(site):
    listed = re.findall(r": (\S+\.md)$", (site / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(site / "docs").as_posix() for path in (site / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages) and len(pages) > 40


def test_a_page_that_the_navigation_does_not_name_gets_a_place():
    titles = {"results/new.md": "New", "index.md": "Overview", "other.md": "Other"}
    made = {key: value for entry in navigation(titles) for key, value in entry.items()}
    assert made["Results"] == [{"New": "results/new.md"}] and made["Overview"] == "index.md"
    assert made["More"] == [{"Other": "other.md"}] and "Results" in NAV


def test_every_link_leads_to_a_page_and_a_heading(site):
    wrong = []
    for page in (site / "docs").rglob("*.md"):
        for name, anchor in re.findall(
            r"\]\(([^)\s#]*)#?([\w-]*)\)", without_code(page.read_text())
        ):
            if name.startswith(("http", "mailto")):
                continue
            target = page.parent / name if name else page
            anchors = (
                {slug(title) for _, title, _ in headings(target.read_text())}
                if anchor and target.is_file()
                else {anchor}
            )
            if not target.is_file() or anchor not in anchors:
                wrong.append(f"{page.relative_to(site)}: {name}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize("source", SPLIT)
def test_a_page_that_is_split_loses_no_line(source):
    text = (ROOT / source).read_text()
    shown = "\n".join(piece.text for piece in pieces(source))
    lost = [line for line in text.splitlines()[1:] if line and line.lstrip("# ") not in shown]
    assert lost == []
    titles = {title for _, names in SPLIT[source].values() for title in names}
    assert titles <= {title for level, title, _ in headings(text) if level == 2}


def test_every_setting_has_a_row_and_every_number_a_unit(site):
    text = (site / "docs/reference/settings.md").read_text()
    theirs = {each.name for each in fields(DistillationConfig)}
    for each in fields(TeachabilityConfig):
        assert f"\n| `{each.name}` |" in text, each.name
        number = re.search(r"\b(int|float)\b", str(each.type))
        if each.name not in theirs and number:
            assert settings.unit_of(each), each.name
    known = {each.name for each in fields(TeachabilityConfig)}
    for table in (settings.UNITS, settings.SOURCES):
        assert {name for names in table.values() for name in names} <= known
    assert settings.group_of_settings()["beta"] == "The loss at the kept tokens"
    assert "\n## Others\n" not in text, "a setting of ours without a group"
    assert "| `budget` | `0.1` | share of the tokens |" in text
    assert "\n## The method and its hold on unselected tokens" in text


def test_every_metric_command_and_file_has_its_place(site):
    from taopd.cli import COMMANDS
    from taopd.runs import schemas
    from taopd.trainer.metrics import METRICS

    metrics, cli, files = (
        (site / f"docs/reference/{name}.md").read_text() for name in ("metrics", "cli", "files")
    )
    assert all(f"| `{key}` |" in metrics for key in METRICS)
    assert all(f"\n## taopd {name}\n" in cli for name in (*COMMANDS, "diagnose freeze"))
    named = {name for name, value in vars(schemas).items() if name in reference.FORMATS and value}
    assert named == set(reference.FORMATS) <= set(reference.shapes())
    assert files.count("\n## ") == len(reference.shapes())
    assert "| `arms[].mean` |" not in files and "| `comparisons[].p_holm` | no |" in files


def test_a_site_that_fetches_is_found(tmp_path):
    inside = '<script src="a.js"></script><a href="https://x.org">x</a><link rel="canonical" href="https://x">'
    (tmp_path / "a.html").write_text(inside)
    assert fetched(tmp_path) == []
    (tmp_path / "b.html").write_text('<link rel="stylesheet" href="https://fonts.org/f.css">')
    (tmp_path / "c.css").write_text("@import url(//x.org/a.css);")
    (tmp_path / "d.html").write_text('<script defer src="https://cdn.org/x.js"></script>')
    assert len(fetched(tmp_path)) == 3
