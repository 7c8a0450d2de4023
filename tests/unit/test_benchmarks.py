"""The benchmarks: tiny cases run (they check results against TRL first), and the page is made from JSON."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as kit
from benchmarks import bench_real, report
from benchmarks.__main__ import run
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import pair_page, saved
from taopd.cli import main

RESULTS = Path(report.__file__).parent / "results"


@pytest.mark.slow
def test_tiny_cases_agree_with_their_peers_and_print_a_table(capfd):
    assert main(["bench", "--tiny", "head_loss", "sparse"]) == 0
    printed = capfd.readouterr().out
    assert "ours 0.05" in printed and "gkd" in printed
    assert "two" in printed and "w32" in printed and "FAILED" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anchor", "bank", "bootstrap", "select", "teacher"])
def test_a_tiny_case_runs_and_ends_with_its_document(name):
    document, _ = run(name, tiny=True)
    assert document["name"] == f"bench_{name}"


@pytest.mark.slow
def test_the_real_models_benchmark_runs_on_micro_models():
    """It compares completions and gradients with TRL's before it prints a time."""
    document, table = run("real", tiny=True)
    assert [row["arm"] for row in document["rows"]] == [
        "trl",
        "trl, autocast",
        "full",
        "5 %, window 8",
        "default, 10 %",
    ]
    assert document["gradient_error"] < 1e-3
    assert "window 8" in table[-3] and "default, 10 %" in table[-2]
    for row in document["rows"]:
        parts = row["sample_s"] + row["update_s"]
        assert 0 < parts <= row["step_s"] * 1.5 and row["peak_mib"] > 100
    started = document["start_up"]
    assert 0 < started["first_line_s"] <= started["step_1_s"]


def test_small_sizes_do_not_stand_where_results_are_kept(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        kit.main(["--tiny", "--save", "select"])
    assert "--save keeps results, and those of --tiny are none" in capsys.readouterr().err
    ran = []
    result = {"status": "done", "seconds": 0.0, "result": {}}
    monkeypatch.setattr(accelerator, "run_stage", lambda name, **o: ran.append(o["toy"]) or result)
    monkeypatch.setattr(accelerator, "gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(accelerator.torch.cuda, "is_available", lambda: True)
    arguments = ["head", "--output", str(tmp_path)]
    assert accelerator.main([*arguments, "--toy"]) == 0
    with pytest.raises(SystemExit, match="no result of stage head"):
        saved.load("head", tmp_path)
    assert accelerator.main(arguments) == 0 and ran == [True, False]
    assert "--toy" not in saved.load("head", tmp_path)["command"]


def test_a_later_stage_that_failed_hides_no_result(tmp_path):
    for gpu, utc, found in (("a", "2026-01-01", {"result": {"rows": []}}), ("b", "2026-02-01", {})):
        path = tmp_path / f"accelerator-head__{gpu}.json"
        path.write_text(json.dumps({"utc": utc, "machine": gpu} | found))
    assert saved.load("head", tmp_path)["machine"] == "a"


def test_of_several_machines_the_newest_result_is_shown(tmp_path):
    for machine, utc in (("aarch64", "2026-03-01"), ("x86_64", "2026-02-01")):
        path = tmp_path / f"teacher__{machine}-cpu.json"
        path.write_text(json.dumps({"benchmark": "teacher", "utc": utc, "machine": machine}))
    assert report.load(tmp_path)["teacher"]["machine"] == "aarch64"


def test_pairs_are_compared_by_seed_and_never_certain():
    """Oracle: the problems by hand; arms that agree everywhere may differ in the next problem."""

    def arm(name, seeds):
        rows = [
            {"name": name, "seed": s, "right_greedy_curve": [[60, d]]} for s, d in seeds.items()
        ]
        return pair_page.at_step(rows, 60)

    one = arm("a", {0: "1100", 2: "1110"})
    assert pair_page.difference(one, arm("b", {2: "1110", 0: "1000"}))[0] == "+12.5"
    assert pair_page.difference(one, arm("b", {1: "0000", 2: "0110"}))[2:] == ["-", "+25.0"]
    same = pair_page.difference(one, one)
    assert same[0] == "+0.0" and float(same[1].removeprefix("± ")) > 1 and same[2] != "[+0.0, +0.0]"
    assert pair_page.difference(one, arm("b", {1: "0000"})) == ["-"] * 4


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
    monkeypatch.setattr(bench_real, "free_bytes", lambda: mib * 2**20)
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
