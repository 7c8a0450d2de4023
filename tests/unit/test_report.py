"""`taopd report` without a browser. Oracles: the page's own bytes, decoded as a browser would; exit codes."""

import base64
import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from taopd import cli
from taopd.errors import DataError
from taopd.report import charts
from taopd.report.arms import color_of, named
from taopd.report.folders import read_folders
from taopd.report.generated_part import write_generated
from taopd.report.pack import Packer
from taopd.report.page import write_report
from taopd.report.sections import accuracy, budget_and_cost, training
from tests.browser import make_pages, synthetic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    write_report(make_pages.small(root / "runs"), root / "small.html", match="exact")
    return root


def element(page: str, name: str) -> str:
    return re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.DOTALL)[1]


def columns(page: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The page's data, read by the rules that the module's docstring gives."""
    described = json.loads(element(page, "rollouts"))
    stream = zlib.decompress(base64.b64decode(element(page, "columns")))
    found = {}
    for name, column in described["columns"].items():
        whole = np.zeros(column["n"], np.int64)
        for place in range(column["width"]):
            at = column["at"] + place * column["n"]
            plane = np.frombuffer(stream, np.uint8, column["n"], at).astype(np.int64)
            whole += plane << (8 * place)
        if "low" in column:
            low, high = (math.copysign(abs(column[k]) ** 0.5, column[k]) for k in ("low", "high"))
            root = low + (high - low) * whole / 1023
            found[name] = root * np.abs(root)
        else:
            found[name] = whole
    return described, found


def test_the_page_holds_what_the_run_logged(small):
    described, found = columns((small / "small.html").read_text())
    lines = [
        json.loads(text) for text in (small / "runs/a/rollouts.jsonl").read_text().splitlines()
    ]
    assert [r["n"] for r in described["rollouts"] if r["run"] == "a"] == [
        len(line["tokens"]) for line in lines
    ]
    start = described["rollouts"][2]["start"]
    line = lines[2]
    here = slice(start, start + len(line["tokens"]))
    words = [described["words"][i] for i in found["token"][here]]
    assert words == [token.replace("Ġ", " ") for token in line["tokens"]]
    for name in ("disagreement", "compatibility", "learnable"):
        span = described["columns"][name]["high"] - described["columns"][name]["low"]
        assert np.abs(found[name][here] - np.array(line[name])).max() < 0.003 * span
    assert (found["rank"][here] - 1).tolist() == line["rank"]
    assert (found["flags"][here] & 1).tolist() == [int(kept) for kept in line["kept"]]


def test_a_small_number_keeps_its_size_and_its_sign():
    """A gain is mostly near 0, and a few are large on either side. Oracle: half a step of the coding."""
    rng = np.random.default_rng(0)
    values = np.concatenate([[-8.0, 12.0], rng.normal(0.0, 0.01, 500), [0.0]])
    packer = Packer()
    packer.numbers("gain", values)
    page = '<script type="a/b" id="rollouts">%s</script><script type="a/b" id="columns">%s</script>'
    _, found = columns(page % (json.dumps({"columns": packer.columns}), packer.base64()))
    half = (8.0**0.5 + 12.0**0.5) / 1023 / 2
    assert (np.abs(found["gain"] - values) <= 2 * np.sqrt(np.abs(values)) * half + half**2).all()
    told = np.abs(values) > half**2
    assert (np.sign(found["gain"]) == np.sign(values))[told].all() and told.sum() > 490


def test_both_lists_come_back_from_the_stream(small):
    described, found = columns((small / "small.html").read_text())
    line = json.loads((small / "runs/a/rollouts.jsonl").read_text().splitlines()[0])
    student, teacher = 0, 0
    written = iter(found["teacher_word"])
    names = {int(i): text.replace("Ġ", " ") for i, text in line["vocabulary"].items()}
    for token in range(len(line["tokens"])):
        size, other = found["student_count"][token], found["teacher_count"][token]
        mine = found["student_word"][student : student + size]
        assert [described["words"][i] for i in mine] == [
            names[i] for i in line["student_top"]["ids"][token]
        ]
        places = found["teacher_place"][teacher : teacher + other]
        theirs = [mine[place - 1] if place else next(written) for place in places]
        assert [described["words"][i] for i in theirs] == [
            names[i] for i in line["teacher_top"]["ids"][token]
        ]
        p = (found["teacher_p"][teacher : teacher + other] / 255) ** 2
        assert np.abs(p - np.exp(line["teacher_top"]["logprobs"][token])).max() < 0.01
        student, teacher = student + size, teacher + other


def test_the_page_is_self_contained_and_its_policy_fits(small):
    page = (small / "small.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page) and "@import" not in page
    assert page.count("default-src 'none'") == 1 and "unsafe" not in page
    assert not re.search(
        r"\s(on\w+|style)=", re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    )


def test_hostile_text_stays_inside_its_elements(tmp_path):
    sources = make_pages.hostile(tmp_path / "runs")
    write_report(sources, tmp_path / "x.html", match="exact")
    page = (tmp_path / "x.html").read_text()
    assert len(re.findall("<script", page)) == 3 and len(re.findall("</script", page)) == 3
    assert "<!--" not in page and "<img" not in page and "\u202e" not in page
    assert len(json.loads(element(page, "rollouts"))["rollouts"]) == 2


def test_sections_appear_only_with_data(tmp_path):
    study = synthetic.write_study(tmp_path / "study")
    assert write_report([study], tmp_path / "x.html").sections == ["Outcome", "Accuracy by budget"]
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "step_time": 0.1}\n')
    assert write_report([run], tmp_path / "x.html").sections == ["Speed and memory"]


def test_a_study_of_another_writer_with_absent_keys_is_shown(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    arms = [
        {"name": "a", "greedy": {"mean": 0.5, "low": 0.4, "high": 0.6}},
        {"name": "b", "greedy": {"mean": 0.3}},
    ]
    rows = [
        {"arm": "a", "reference": "b", "difference": 0.2, "low": 0.1, "high": 0.3, "p_holm": 0.01}
    ]
    (folder / "results.json").write_text(json.dumps({"arms": arms, "comparisons": rows}))
    write_report([folder], tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "40.0 to 60.0" in page and "+20.0" in page and "+10.0 to +30.0" in page


def test_a_study_that_still_runs_shows_the_arms_that_have_finished(tmp_path):
    study = synthetic.write_study(tmp_path / "study")
    outcomes = json.loads((study / "results.json").read_text())["arms"]
    (study / "results.json").unlink()
    for number, outcome in enumerate(outcomes):
        arm = study / "arms" / str(number)
        arm.mkdir(parents=True)
        (arm / "arm.json").write_text("{}")
        if number:  # the first still runs
            (arm / "results.json").write_text(json.dumps(outcome))
    (found,) = read_folders([study]).studies
    assert len(found.outcomes) == len(outcomes) - 1
    assert "Outcome" in write_report([study], tmp_path / "x.html").sections
    page = (tmp_path / "x.html").read_text()
    assert f"not finished: {len(outcomes) - 1} of {len(outcomes)} arms and seeds" in page
    assert "ends highest" in page


@pytest.mark.parametrize("whole", [False, True], ids=["as logged", "whole lists"])
def test_200_rollouts_of_512_tokens_fit_5_mb(tmp_path, whole):
    """Measured in docs/report.md."""
    sources = make_pages.large(tmp_path / "runs", whole=whole)
    report = write_report(sources, tmp_path / "x.html", match="exact")
    assert report.num_rollouts == 200 and report.num_bytes <= 5_000_000


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(tmp_path):
    run = make_pages.small(tmp_path / "runs")[0]
    path = run / "rollouts.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert write_report([run], tmp_path / "x.html", match="exact").num_rollouts == 7
    path.write_text(whole[:50] + "\n" + whole)
    with pytest.raises(DataError, match="line 1"):
        write_report([run], tmp_path / "x.html", match="exact")


def test_the_command_writes_a_page_and_refuses_other_folders(tmp_path, capsys):
    run = make_pages.small(tmp_path / "runs")[0]
    output = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "-o", str(output), "--match", "exact"]) == 0
    assert output.is_file() and "8 rollouts" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "new")]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert cli.main(["report", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 24


def test_report_and_inspect_load_no_torch(tmp_path):
    run = make_pages.small(tmp_path / "runs")[0]
    code = (
        "import sys; from taopd.cli import main;"
        f"main(['report', {str(run)!r}, '-o', {str(tmp_path / 'x.html')!r}, '--match', 'exact']);"
        f"main(['inspect', {str(run)!r}, '--match', 'exact']);"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'trl'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_intervals_match_their_formulas():
    """Oracles: Wilson's formula as published; the t quantile of a table (3 seeds: 4.303)."""
    from taopd.report.sections.accuracy import interval

    mean, low, high = interval([0.9], 500)
    z, n = 1.959964, 500
    middle = (0.9 + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (0.9 * 0.1 / n + z * z / (4 * n * n)) ** 0.5
    assert mean == 0.9 and (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    mean, low, high = interval([0.5, 0.6, 0.7], None)
    half = 4.302653 * 0.1 / 3**0.5
    assert mean == pytest.approx(0.6) and (low, high) == pytest.approx((0.6 - half, 0.6 + half))
    assert interval([0.5], None) is None


def test_verdicts_and_pictures_of_a_diagnostic_report(tmp_path):
    folder = ROOT / "docs" / "results" / "diagnostic"
    (tmp_path / "report").mkdir()
    verdict = {
        "claim": "<c>",
        "verdict": "holds",
        "direction": "forward",
        "unit": "nats",
        "sentence": "0.1 > 0",
    }
    (tmp_path / "report/verdicts.json").write_text(json.dumps([verdict]))
    picture = (folder / "dialect-matched_top_n.png").read_bytes()
    (tmp_path / "report/matched_top_n.png").write_bytes(picture)
    assert write_report([tmp_path / "report"], tmp_path / "x.html").sections == [
        "Which signals were learnable"
    ]
    page = (tmp_path / "x.html").read_text()
    data, width = re.search(r'src="data:image/png;base64,([^"]+)" width="(\d+)"', page).groups()
    assert base64.b64decode(data) == picture and int(width) > 100
    assert "&lt;c&gt;" in page and "<c>" not in page


def test_speed_compares_cpu_time_where_every_run_has_it_and_says_so_where_not(tmp_path):
    """Two runs that do the same work, one of them on a busy machine: twice the wall time."""
    for selector, wall in (("full", 2.0), ("random", 1.0)):
        folder = tmp_path / selector
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"selector": "{selector}"}}')
        (folder / "metrics.jsonl").write_text(
            f'{{"step": 1, "loss": 1.0, "step_time": {wall}, "perf/cpu_s": 0.9}}\n'
        )
    folders = [tmp_path / "full", tmp_path / "random"]
    page = training.speed(read_folders(folders).runs)
    assert "CPU time of a step" in page and "1.00 of full" in page and "0.50 of full" not in page
    (tmp_path / "random" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "step_time": 1.0}\n'
    )
    page = training.speed(read_folders(folders).runs)
    assert "0.50 of full" in page and "equally loaded machines" in page


def test_the_part_that_a_command_writes_leaves_the_rest_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    write_generated(page, "one", title="Title")
    assert page.read_text().startswith("# Title\n") and "\none\n" in page.read_text()
    page.write_text(page.read_text().replace("# Title", "# By hand") + "after\n")
    write_generated(page, "two")
    text = page.read_text()
    assert "# By hand" in text and "\ntwo\n" in text and "one" not in text
    assert text.endswith("after\n")
    for cut in (
        "no place at all",
        "<!-- generated -->\n",
        "<!-- end of generated -->\n<!-- generated -->",
    ):
        page.write_text(cut)
        with pytest.raises(DataError, match="lacks the line"):
            write_generated(page, "three")
        assert page.read_text() == cut


def test_no_line_of_the_budget_joins_arms_of_two_methods(tmp_path):
    arms = [
        {
            **{"name": f"{method}-{budget}", "selector": "teachability", "method": method},
            **{"budget": budget, "seed": 0, "accuracy_greedy": end, "num_test_prompts": 100},
            "accuracy_curve": [[0, 0.1], [9, end]],
        }
        for method, budget, end in (
            *[("reach", 0.05, 0.36), ("reach", 0.1, 0.32)],
            *[("published", 0.05, 0.3), ("published", 0.1, 0.35)],
        )
    ]
    page = budget_section(tmp_path / "methods", arms)
    assert page.count('class="line k') == 2 * 2  # in the key and in the chart
    assert ">teachability, reach<" in page and ">teachability, published<" in page
    # Results of an earlier version do not say which method: nothing is joined.
    for arm in arms:
        del arm["method"]
    assert budget_section(tmp_path / "unknown", arms) == ""


def budget_section(folder: Path, arms: list[dict]) -> str:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"arms": arms}))
    return budget_and_cost.budget_curve(read_folders([folder]).studies)


def test_a_curve_ends_with_the_number_of_the_table(tmp_path):
    # 99.65 as a number is just below: 99.6, and 99.7 if the seeds are turned into per cent one by one.
    (tmp_path / "study").mkdir()
    arms = [
        {"name": "tip", "selector": "tip", "seed": seed, "num_test_prompts": 1000}
        | {"accuracy_greedy": end, "accuracy_curve": [[0, 0.1], [9, end]]}
        for seed, end in enumerate([1.0, 0.993])
    ]
    (tmp_path / "study" / "results.json").write_text(json.dumps({"arms": arms}))
    section = accuracy.body(read_folders([tmp_path / "study"]).studies)
    assert "99.6<" in section and "99.7" not in section


def test_more_arms_than_colors_differ_in_their_lines(tmp_path):
    (tmp_path / "study").mkdir()
    names = [f"arm{n:02}" for n in range(12)]
    arms = [
        {"name": name, "selector": "tip", "accuracy_curve": [[0, 0.1], [9, 0.2]]} for name in names
    ]
    (tmp_path / "study" / "results.json").write_text(json.dumps({"arms": arms}))
    (study,) = named(read_folders([tmp_path / "study"])).studies
    assert len({charts.line_class(color_of(study, name)) for name in names}) == len(names)
