"""Arms that have come to different steps, on the pages about accuracy over steps."""

import json

from scripts.pages.over_steps import gathered, generated


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


def test_arms_are_compared_where_all_have_come_and_shown_to_their_end(tmp_path):
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    about = {"git_commit": "abcdefghi", "devices": ["cpu"], "versions": versions}
    tmp_path.joinpath("env.json").write_text(json.dumps(about))
    arm(tmp_path, "reach-10", [(0, "0000"), (40, "1000"), (80, "1111")])
    arm(tmp_path, "anchored-10", [(0, "0000"), (40, "0111")])
    arm(tmp_path, "full", [(0, "0000")])
    text = generated(gathered([tmp_path]), "smollm2-long")
    assert "| reach-10, seed 0 | 0 | 25 | 100 | 50 | 9 |" in text
    assert "| anchored-10, seed 0 | 0 | 75 |  | 50 | 9 |" in text
    assert "80 of 200 steps" in text and "After 40 steps:" in text
    assert "| reach-10, seed 0 - anchored-10, seed 0 | -50.0 |" in text
    assert "Not run: full, seed 0" in text
