"""`taopd compare` with learning rates on a micro lab: 2 arms x 2 rates x 2 seeds of one step, and resumed."""

import json

import pytest
import yaml

from taopd.cli import main

RATES = [1e-3, 1e-1]


@pytest.mark.slow
def test_a_study_with_rates_from_file_to_page(micro_lab, tmp_path, capsys, forked_arms):
    path, output = tmp_path / "rates.yaml", tmp_path / "out"
    study = {
        **{"student": str(micro_lab.student), "teacher": str(micro_lab.teacher)},
        **{"prompts": str(micro_lab.prompts), "output": str(output)},
        "config": {
            **{"max_steps": 1, "max_completion_length": 4, "per_device_train_batch_size": 4},
            **{"gradient_checkpointing": False, "logging_steps": 1, "score_top_k": 4},
        },
        "arms": [{"name": "full", "selector": "full"}, {"name": "tip", "selector": "tip"}],
        "random_control": False,
        "rates": RATES,
        "seeds": [0, 1],
        "num_test_prompts": 4,
        "workers": 2,
    }
    path.write_text(yaml.safe_dump(study))
    assert main(["compare", str(path), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "4 arms (learning rates: 2) x 2 seed(s)" in shown and "tip,lr=0.001" in shown
    assert main(["compare", str(path)]) == 0
    assert "Shared learning rate: " in capsys.readouterr().out
    whole = (output / "results.json").read_bytes()
    found = json.loads(whole)
    assert len(list((output / "arms").glob("*/results.json"))) == 8
    used = {(o["name"], o["learning_rate"]) for o in found["outcomes"]}
    assert used == {(f"{a},lr={r:g}", r) for a in ("full", "tip") for r in RATES}
    (row,) = found["rates"]["comparisons"]
    assert (row["arm"], row["reference"], row["seeds"]) == ("tip", "full", [0, 1])
    assert row["own_best"]["over_problems"]["low"] <= row["own_best"]["difference"]
    assert {"rates.png", "rates.svg"} <= {p.name for p in output.iterdir()}
    assert "## Learning rates" in (output / "summary.md").read_text()

    (output / "arms" / "tip,lr=0.1-seed1" / "results.json").unlink()
    kept = output / "arms" / "tip,lr=0.1-seed0" / "results.json"
    before = kept.stat().st_mtime_ns
    assert main(["compare", str(output), "--output", str(tmp_path / "so-far")]) == 0
    partial = json.loads((tmp_path / "so-far" / "results.json").read_text())
    assert partial["rates"]["comparisons"][0]["seeds"] == [0]
    capsys.readouterr()
    assert main(["compare", str(output), str(tmp_path / "so-far")]) == 0
    assert capsys.readouterr().out.count("Shared learning rate: ") == 2
    assert main(["compare", str(path), "--resume"]) == 0
    assert (output / "results.json").read_bytes() == whole
    assert kept.stat().st_mtime_ns == before
    page = tmp_path / "page.html"
    assert main(["report", str(output), "-o", str(page)]) == 0
    assert "accuracy against learning rate" in page.read_text()
