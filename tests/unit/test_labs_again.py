"""The table of labs that are made again, on made-up curves. Oracle: what its columns say."""

import json

from scripts.labs_again import gathered, table

STEPS = (0, 400, 600, 1000)


def finished(folder, part, lab_seed, **arms):
    """A finished job: name -> greedy accuracy at STEPS; sampled accuracy is a tenth of it."""
    document = {
        "variant": "made",
        "loss": "reverse_kl",
        "lab_seed": lab_seed,
        "models": {"teacher": 1.0 - lab_seed / 100, "student": 0.4},
        "arms": [
            {
                "name": name,
                "accuracy_curve": list(zip(STEPS, greedy, strict=True)),
                "accuracy_sampled_curve": [
                    (step, value / 10) for step, value in zip(STEPS, greedy, strict=True)
                ],
            }
            for name, greedy in arms.items()
        ],
    }
    (folder / f"{part}__made__{lab_seed}.json").write_text(json.dumps(document))


def test_a_row_has_the_ends_of_the_default_and_of_its_rivals(tmp_path):
    finished(tmp_path, "reach", 1, **{"reach@0.1": (0.0, 0.2, 0.9, 1.0)})
    finished(tmp_path, "reach", 2, **{"reach@0.1": (0.0, 0.9, 0.3, 0.8)})
    finished(tmp_path, "rivals", 1, full=(0.0, 0.7, 0.1, 0.0))
    rows = gathered(tmp_path)
    last = table(rows, {("made", "reverse_kl", "reach@0.1"): 0.99}).splitlines()[-1]
    # Teachers, first pair, ends, sampled, full's end and best, none of published, least of the second half.
    assert last == "| made | exact | 99, 98 | 99 | 100, 80 | 10, 8 | 0 (70) | - | 90, 30 |"
