"""What the package says about itself. Oracles: the README's own words, the files of the repository."""

import re
import tomllib
from pathlib import Path

import yaml

import taopd
from scripts.long_description import portable

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_long_description_leads_nowhere_that_is_not_there():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", portable(text))
    assert all(link.startswith("https://") for link in links)
    assert "docs/math.md" in portable(text) and len(portable(text)) > 0.9 * len(text)
    assert portable("[a](b.md) [c](https://d) ![e](f.png) [g.md](docs/g.md)") == (
        "a (b.md) [c](https://d) (picture: e) g.md"
    )


def test_versions_and_names_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == taopd.__version__
    assert citation["authors"] == PROJECT["authors"] == [{"name": "taopd contributors"}]
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2605.26844" and len(paper["authors"]) == 9
    assert PROJECT["license"] == citation["license"]


def test_the_extras_of_the_readme_exist():
    assert set(PROJECT["optional-dependencies"]) >= {"vllm", "eval", "docs", "dev"}
