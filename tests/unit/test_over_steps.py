"""Arms that have come to different steps, on the pages about accuracy over steps."""

import json

from scripts.pages.over_steps import gathered, generated


def arm(folder, name, curve, seed):
    """A study's arm on disk: (step, answers by problem)."""
    folder = folder / "arms" / name
    folder.mkdir(parents=True)
    folder.joinpath("arm.json").write_text(json.dumps({"name": name, "seed": seed}))
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


def run_of(folder, curves, seed=0):
    """A study's folder with these arms: name -> curve."""
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    about = {"git_commit": "abcdefghi", "devices": ["cpu"], "versions": versions}
    for name, curve in curves.items():
        arm(folder, name, curve, seed)
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


def test_arms_of_the_file_stay_and_are_compared_where_their_answers_are_known(tmp_path):
    saved = tmp_path / "saved.json"
    whole, half = [(0, "0000"), (40, "1110"), (80, "1111")], [(0, "0000"), (40, "1000")]
    first = run_of(tmp_path / "a", {"reach-10": whole, "anchored-10": half})
    saved.write_text(json.dumps(gathered([first])))
    late = [(0, "0000"), (40, "0000"), (80, "0011")]
    text = generated(gathered([run_of(tmp_path / "b", {"full": late})], saved), "smollm2-long")
    at_80, at_40 = text.split("After 80 steps:")[1].split("After 40 steps:")
    assert "| reach-10, seed 0 - full, seed 0 | +50.0 |" in at_80 and "anchored" not in at_80
    assert "| reach-10, seed 0 - anchored-10, seed 0 | +50.0 |" in at_40
    assert "| anchored-10, seed 0 - full, seed 0 | +25.0 |" in at_40


def test_another_arm_of_another_seed_is_not_compared(tmp_path):
    right, wrong = [(0, "0000"), (40, "1110")], [(0, "0000"), (40, "0000")]
    folders = [
        run_of(tmp_path / "a", {"reach-10": right}),
        run_of(tmp_path / "b", {"reach-10": wrong, "full": wrong}, seed=1),
    ]
    text = generated(gathered(folders), "smollm2-long")
    assert "| reach-10, seed 0 - reach-10, seed 1 | +75.0 |" in text
    assert "| full, seed 1 | 0 | 0 |" in text and "- full, seed 1" not in text
