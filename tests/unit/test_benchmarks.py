"""The benchmarks: tiny cases run (they check results against TRL first), and the page is made from JSON."""

import shutil
from pathlib import Path

import pytest

from benchmarks import report
from taopd.cli import main

RESULTS = Path(report.__file__).parent / "results"


@pytest.mark.slow
def test_tiny_cases_agree_with_their_peers_and_print_a_table(capfd):
    assert main(["bench", "--tiny", "head_loss", "sparse"]) == 0
    printed = capfd.readouterr().out
    assert "ours 0.05" in printed and "gkd" in printed
    assert "two" in printed and "w32" in printed and "FAILED" not in printed


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
