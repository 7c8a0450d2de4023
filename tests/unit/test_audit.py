"""The audit of dependencies. Oracles: the installed packages, and pins that are wrong on purpose."""

import json

import pytest
from packaging.version import Version

from scripts.audit import (
    ROOT,
    advisory_problems,
    database_verdict,
    needed,
    pin_problems,
    read_pins,
)

ADVISORIES = json.loads((ROOT / "scripts" / "advisories.json").read_text())
PINS = read_pins((ROOT / "constraints.txt").read_text())


def test_the_closure_reaches_what_only_others_need():
    owners = {requirement.name: owner for requirement, owner in needed()}
    assert (
        owners["trl"] == "taopd" and "pytest" in owners and "markupsafe" in map(str.lower, owners)
    )


def test_a_missing_and_a_wrong_pin_are_named():
    assert any("has no pin" in text and "numpy" in text for text in pin_problems({}))
    wrong = PINS | {"numpy": Version("0.1")}
    assert any(text.startswith("numpy is") and "says 0.1" in text for text in pin_problems(wrong))


def test_no_pin_of_this_project_has_a_known_advisory():
    assert advisory_problems(PINS, ADVISORIES) == []


@pytest.mark.parametrize("entry", ADVISORIES, ids=lambda entry: entry["id"])
def test_each_advisory_would_be_found_and_acceptance_has_a_reason(entry):
    problems = advisory_problems({entry["package"]: Version("0.0.1")}, [entry])
    assert len(problems) == (0 if "accepted" in entry else 1)
    assert len(entry.get("accepted", "a reason is given")) > 10


def test_the_databases_answer_is_read():
    """The form of `pip-audit --format json`."""
    vuln = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": ""}
    document = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [vuln]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        ]
    }
    problems, count = database_verdict(document, [])
    assert problems == ["a 1.0: PYSEC-1, mended in ['2.0']"] and count == 2
    accepted = [{"package": "a", "fixed": None, "id": "CVE-1", "accepted": "not used"}]
    assert database_verdict(document, accepted) == ([], 2)


def test_the_page_counts_the_pins_and_the_advisories():
    """It said 125 pins, of which there were 128."""
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    assert f"Every one of {len(PINS)} pins" in page and f"the {len(ADVISORIES)} advisories" in page
