"""The benchmarks: tiny cases run (they check results against TRL first), and the page is made from JSON."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench_real, report
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
    assert [row["arm"] for row in document["rows"]] == [
        "trl",
        "trl, autocast",
        "full",
        "5 %, window 8",
    ]
    assert document["gradient_error"] < 1e-3 and "window 8" in table[-2]
    for row in document["rows"]:
        parts = row["sample_s"] + row["update_s"]
        assert 0 < parts <= row["step_s"] * 1.5 and row["peak_mib"] > 100
    started = document["start_up"]
    assert 0 < started["first_line_s"] <= started["step_1_s"]


def test_a_batch_unlike_trls_is_named_before_any_time():
    case = bench_real.Case(Path(), rollouts=1, tokens=1, repeats=1, bf16=False)
    found = {
        "trl": [{"sampled": "a"}, {"sampled": "a"}],
        "5 %": [{"sampled": "a"}, {"sampled": "b"}],
    }
    with pytest.raises(SystemExit, match=r"batch of '5 %' in step 1 is not TRL's of step 0"):
        bench_real.check(found, case)


@pytest.mark.parametrize("mib", [6_000, 12_000])
def test_too_little_memory_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, mib):
    free = SimpleNamespace(available=mib * 2**20)
    monkeypatch.setattr(bench_real.psutil, "virtual_memory", lambda: free)
    # A folder without models: whoever loads one fails otherwise.
    case = bench_real.Case(tmp_path, rollouts=1, tokens=1, repeats=1, bf16=True)
    with pytest.raises(
        SystemExit,
        match=rf"{mib / 1024:.1f} GiB of memory are free.* 3 arms side by side take 12 GiB",
    ):
        bench_real.measure(case, list(bench_real.ARMS))


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
