"""Broken and half-written folders, and what the page warns of. Oracles: exit codes, messages, files."""

import json
import os
from pathlib import Path

import pytest

from taopd import cli
from taopd.preflight import rollout_checks as preflight
from taopd.report import charts
from taopd.report.charts import Series, areas
from taopd.report.folders import read_folders
from taopd.report.page import write_report
from taopd.report.sections import warnings
from taopd.report.sections.tables import table
from tests.browser import make_pages, synthetic


@pytest.fixture
def run(tmp_path):
    return make_pages.small(tmp_path / "runs")[0]


BROKEN = {
    "list in the log": ("metrics.jsonl", b"[1]\n", "metrics.jsonl, line 1: expected an object"),
    "bytes": ("metrics.jsonl", bytes(range(256)), "metrics.jsonl is no text"),
    "config": ("config.json", b'{"a":', "config.json: not JSON"),
    "tokens": ("rollouts.jsonl", b'{"tokens": 5}\n', "line 1, tokens: expected a list"),
    "columns": ("rollouts.jsonl", b'{"tokens": ["a"], "kept": [1, 0]}\n', "line 1, kept: 2 entries for 1"),
    "a last line that ends": ("metrics.jsonl", b'{"step": 1}\nx\n', "metrics.jsonl, line 2: not JSON"),
    "a warning": ("warnings.jsonl", b"garbage\n", "warnings.jsonl, line 1: not JSON"),
    "check": ("check.json", b'{"items": 3}', "check.json, items: expected a list, got 3"),
    "an item": ("check.json", b'{"items": [3]}', "check.json, items[0]: expected an object"),
    "selection": ("selection/step-000000.parquet", b"PAR1", "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_and_no_page(run, tmp_path, capsys, name):
    file, content, message = BROKEN[name]
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_bytes(content)
    assert cli.main(["report", str(run), "-o", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json", "results.json", "warnings.jsonl"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to("nowhere"), "is no file"),
    ],
)
def test_what_bears_the_name_of_a_file_and_is_none_is_refused(
    run, tmp_path, capsys, file, make, words
):
    (run / file).unlink(missing_ok=True)
    make(run / file)
    for argv in (["report", "-o", str(tmp_path / "x.html")], ["inspect"]):
        assert cli.main([argv[0], str(run), *argv[1:]]) == 2
        error = capsys.readouterr().err
        assert f"{file} {words}" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/bin/taopd", "train", "--max_steps", "9", "--resume"], "taopd train --max_steps 9"),
        (["/x/taopd/__main__.py", "compare", "a b.yaml"], "taopd compare &#x27;a b.yaml&#x27;"),
        (["mine.py", "--rate", "3"], "python mine.py --rate 3"),
        (["/x/ipykernel_launcher.py", "-f", "kernel.json"], None),
        (["/x/pytest/__main__.py", "tests"], None),
    ],
)
def test_how_to_run_it_again_is_what_began_the_run(run, tmp_path, argv, shown):
    (run / "env.json").write_text(json.dumps({"argv": argv}))
    write_report([run], tmp_path / "x.html", match="exact")
    page = (tmp_path / "x.html").read_text()
    assert ("How to run it again" in page) == (shown is not None)
    assert shown is None or f"<td>{shown}</td>" in page


def test_an_output_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path, "give a file that ends in .html"),
        (tmp_path / "file/x.html", "cannot write"),
    ):
        assert cli.main(["report", str(run), "-o", str(output)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "runs"}


def test_a_page_that_is_a_link_stays_one_to_the_new_page(run, tmp_path):
    """The page that it leads to, as on a web server, was left as it was."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "page.html").write_text("old")
    link = tmp_path / "link.html"
    link.symlink_to(Path("served") / "page.html")
    write_report([run], link)
    assert link.is_symlink() and "<html" in (tmp_path / "served" / "page.html").read_text()


def test_a_killed_and_an_empty_run_are_shown_with_a_warning(run, tmp_path):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[:-40])
    write_report([run], tmp_path / "x.html", match="exact")
    page = (tmp_path / "x.html").read_text()
    assert "the last line of metrics.jsonl is cut" in page and "rollouts.jsonl is cut" in page
    empty = synthetic.write_run(tmp_path / "empty", [])
    (empty / "metrics.jsonl").write_text("")
    assert write_report([empty], tmp_path / "y.html").sections == ["What was run"]
    page = (tmp_path / "y.html").read_text()
    assert "no step was logged yet" in page and "No rollouts were logged" in page


def test_guard_check_teacher_and_sampler_are_on_the_page(run, tmp_path):
    def write(name, value):
        (run / name).write_text(json.dumps(value) + "\n")

    write("warnings.jsonl", {"step": 35, "reason": "unselected tokens have drifted"})
    passed = {"item": "context", "level": "pass", "measured": "8 of 64", "advice": ""}
    warned = {"item": "memory", "level": "warn", "measured": "85 %", "advice": "Halve the batch."}
    write("check.json", {"items": [passed, warned]})
    about = {"kind": "vllm", "model": "T", "url": "http://x:1", "compatibility": "lower bound"}
    write("teacher.json", about)
    metrics = [
        {"step": step, "guard/idle_drift_nats": 0.2 * step, "rollout/drift_nats/mean": 0.5}
        for step in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    write_report([run], tmp_path / "x.html", match="exact")
    page = (tmp_path / "x.html").read_text()
    for text in (
        "collapse guard, step 35: unselected tokens have drifted",
        "check before training, memory: 85 %. Halve the batch.",
        "checked before training: 1 pass, 1 warn.",
        "teacher T, vllm at http://x:1; C is a lower bound",
        "C is a lower bound, D is of two lists",
        "differ by 0.5 nats a token from step 1",
        "Drift of the tokens that nobody teaches",
    ):
        assert text in page, text


def test_integers_that_no_float_holds_are_shown(run, tmp_path):
    """JSON has them."""
    huge = 10**400
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lab": huge, "changed": {"lab": huge}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": huge}) + "\n")
    write_report([run], tmp_path / "x.html", match="exact")
    page = (tmp_path / "x.html").read_text()
    assert "the loss was not finite at step 1" in page and "1" + "0" * 70 in page


def test_the_pages_limits_are_those_of_the_run():
    assert warnings.DRIFT_WARN == preflight.DRIFT_WARN
    assert warnings.TRUNCATED == preflight.TRUNCATED


def test_stacked_shares_fill_the_height_and_name_their_end():
    """Oracle: four shares that add up to one reach from 0 to 100 %, by hand."""
    shares = (0.1, 0.2, 0.3, 0.4)
    series = [
        Series(label=f"q{i}: x", points=[(0, 0.25), (1, share)], color=i)
        for i, share in enumerate(shares)
    ]
    chart = areas("x", series)
    assert [f"q{i} {100 * share:.0f} %" in chart for i, share in enumerate(shares)] == [True] * 4
    corners = [part.split('"')[1] for part in chart.split("<polygon ")[1:]]
    heights = {float(pair.split(",")[1]) for path in corners for pair in path.split()}
    assert (min(heights), max(heights)) == (10.0, 160.0)


def test_a_chart_of_the_first_runs_shows_the_first_seed_of_every_arm(tmp_path):
    """Runs stood by name: of five arms with four seeds the charts showed two arms."""
    for seed in (0, 1, 10):
        for arm in ("b", "a"):
            folder = tmp_path / "study" / "arms" / f"{arm}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "arm.json").write_text(
                json.dumps({"name": arm, "seed": seed}), encoding="utf-8"
            )
            (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    names = [run.path.name for run in read_folders([tmp_path / "study"]).runs]
    assert names == [f"{arm}-seed{seed}" for seed in (0, 1, 10) for arm in "ab"]


def test_a_long_name_wraps_so_that_its_numbers_stay_in_sight():
    """Claims of a diagnostic pushed the column "cannot be told" out of the page: the row said 0, 0, 0."""
    made = table(["claim", "holds"], [["order " + "x" * 60, "4"], ["short", "0"]], numeric=(1,))
    assert made.count('<td class="long">') == 1 and "<td>short</td>" in made
    style = (Path(charts.__file__).parent / "assets" / "page.css").read_text(encoding="utf-8")
    assert style.index("td.long { white-space: normal") > style.index("td:first-child, .n {")
