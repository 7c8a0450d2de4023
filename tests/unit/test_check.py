"""`taopd check`: planted mismatches are caught, each by its item and by no other; the tiny lab is clean.

Oracle: what was planted (`tests.planted`), into copies of the lab's real files.
"""

import pytest

from tests.planted import PLANTED, check


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mismatch_is_caught_by_its_item_alone(name, tmp_path):
    status, items = check(name, tmp_path)
    assert {item["item"]: item["level"] for item in items if item["level"] != "pass"} == (
        PLANTED[name].caught
    )
    assert status == int("fail" in PLANTED[name].caught.values())
    assert all(bool(item["advice"]) == (item["level"] != "pass") for item in items)
    assert not (tmp_path / "run").exists()
