"""Arms that have come to different steps, on the pages about accuracy over steps."""

import json

import pytest

from scripts.pages.over_steps import gathered, generated
from taopd.errors import ConfigError


def arm(folder, name, curve):
    """A study's arm on disk: (step, answers by problem)."""
    folder = folder / "arms" / name
    folder.mkdir(parents=True)
    folder.joinpath("arm.json").write_text(json.dumps({"name": name, "seed": 0}))
    rows = [
        {
            "step": step,
            "accuracy_greedy": right.count("1") / len(right),
            "accuracy_sampled": 0.5,
            "mean_tokens_greedy": 9.0,
            "right_greedy": right,
        }
        for step, right in curve
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folder.joinpath("accuracy.jsonl").write_text(lines)


def run_of(folder, curves):
    """A study's folder with these arms: name -> curve."""
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    about = {"git_commit": "abcdefghi", "devices": ["cpu"], "versions": versions}
    for name, curve in curves.items():
        arm(folder, name, curve)
    folder.joinpath("env.json").write_text(json.dumps(about))
    return folder


def test_arms_are_compared_where_all_have_come_and_shown_to_their_end(tmp_path):
    curves = {
        "reach-10": [(0, "0000"), (40, "1000"), (80, "1111")],
        "anchored-10": [(0, "0000"), (40, "0111")],
        "full": [(0, "0000")],
    }
    text = generated(gathered([run_of(tmp_path, curves)]), "smollm2-long")
    assert "| reach-10, seed 0 | 0 | 25 | 100 | 50 | 9 |" in text
    assert "| anchored-10, seed 0 | 0 | 75 |  | 50 | 9 |" in text
    assert "80 of 200 steps" in text and "After 40 steps:" in text
    assert "| reach-10, seed 0 - anchored-10, seed 0 | -50.0 |" in text
    assert "Not run: full, seed 0" in text


def test_arms_of_the_file_stay_where_their_answers_are_those_that_are_compared(tmp_path):
    saved = tmp_path / "saved.json"
    whole, half = [(0, "0000"), (40, "1110"), (80, "1111")], [(0, "0000"), (40, "1000")]
    saved.write_text(
        json.dumps(gathered([run_of(tmp_path / "a", {"reach": whole, "anchored": half})]))
    )
    both = gathered([run_of(tmp_path / "b", {"full": whole})], saved)
    assert {row["name"]: row["right"] for row in both["arms"]} == {
        "reach, seed 0": "1110",
        "anchored, seed 0": "1000",
        "full, seed 0": "1110",
    }
    # All have come to step 80 now, where the file has no answers of `reach`.
    with pytest.raises(ConfigError, match="reach, seed 0 are of another checkpoint"):
        gathered([run_of(tmp_path / "c", {"anchored": whole})], saved)
