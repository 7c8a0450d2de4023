"""The benchmarks: tiny cases run (they check results against TRL first), and the page is made from JSON."""

import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import run
from taopd.cli import main

RESULTS = Path(report.__file__).parent / "results"


@pytest.mark.slow
def test_tiny_cases_agree_with_their_peers_and_print_a_table(capfd):
    assert main(["bench", "--tiny", "head_loss", "sparse"]) == 0
    printed = capfd.readouterr().out
    assert "ours 0.05" in printed and "gkd" in printed
    assert "two" in printed and "w32" in printed and "FAILED" not in printed


@pytest.mark.slow
def test_the_real_models_benchmark_runs_on_micro_models():
    """It compares completions and gradients with TRL's before it prints a time."""
    document, table = run("real", tiny=True)
    assert [row["arm"] for row in document["rows"]] == ["trl", "full", "5 %, window 8"]
    assert document["gradient_error"] < 1e-3 and "window 8" in table[-2]
    for row in document["rows"]:
        parts = row["sample_s"] + row["update_s"]
        assert 0 < parts <= row["step_s"] * 1.5 and row["peak_mib"] > 100
    started = document["start_up"]
    assert 0 < started["first_line_s"] <= started["step_1_s"]


def test_an_unknown_benchmark_is_named(capsys):
    assert main(["bench", "hed_loss"]) == 2
    assert "no benchmark is called 'hed_loss'" in capsys.readouterr().err


def test_the_page_is_made_from_saved_results(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results, ignore=shutil.ignore_patterns("*.png"))
    report.write_results(results, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    for document in report.load(results).values():
        assert document["command"] in page and document["commit"] in page
    assert (results / "window_lab.png").read_bytes().startswith(b"\x89PNG")
