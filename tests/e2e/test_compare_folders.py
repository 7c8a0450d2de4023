"""`taopd compare` over finished folders of the micro lab. Oracles: counts by hand from the transcripts."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
from scipy import stats

from taopd.cli import main
from taopd.report.arms import owner_of
from taopd.report.evaluations import differences, read_evaluation
from taopd.report.folders import read_folders
from tests.conftest import replaced
from tests.unit.test_report_meets import evaluation


@pytest.fixture(scope="module")
def lab(micro_lab, tmp_path_factory):
    """Two runs of two steps and an evaluation of each, by the commands themselves."""
    root = tmp_path_factory.mktemp("compared")
    config = root / "config.yaml"
    config.write_text(
        f"model_name_or_path: {micro_lab.student}\nteacher_model_name_or_path: {micro_lab.teacher}\n"
        f"dataset_name: {micro_lab.prompts}\nuse_cpu: true\nbf16: false\nmax_steps: 2\nscore_top_k: 4\n"
        "per_device_train_batch_size: 4\nmax_completion_length: 4\nreport_to: none\nsave_steps: 2\n"
        "learning_rate: 0.01\n"
    )
    for name, selector in (("ours", "teachability"), ("plain", "random")):
        argv = ["--config", str(config), "--output_dir", str(root / name), "--selector", selector]
        assert main(["train", *argv, "--skip-check", "--quiet", "--budget", "0.5"]) == 0
        grade(root / f"{name}/model", micro_lab, root / f"{name}-eval")
    return root


def grade(model, micro_lab, output, *more):
    """4 samples a problem; a digit anywhere is graded, so that micro models are sometimes right."""
    argv = [str(model), "--dataset", str(micro_lab.prompts), "--output", str(output)]
    settings = ["--num-samples", "4", "--max-new-tokens", "4", "--seed", "3"]
    settings += ["--match", r"regex:(?<!\d)\d"]
    assert main(["evaluate", *replaced([*argv, *settings], *more)]) == 0


def shares(folder):
    found = {}
    for line in (folder / "transcripts.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault((str(row["prompt"]), row["answer"]), []).append(row["correct"])
    return {problem: sum(right) / len(right) for problem, right in found.items()}


def test_a_run_its_evaluation_and_a_second_run(lab, tmp_path, capsys):
    folders = [str(lab / name) for name in ("ours", "ours-eval", "plain", "plain-eval")]
    assert main(["compare", *folders, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [(row["arm"], row["selector"], row["budget"]) for row in found["arms"]] == [
        ("ours", "teachability", 0.5),
        ("plain", "random", 0.5),
    ]
    ours, plain = (shares(lab / f"{name}-eval") for name in ("ours", "plain"))
    assert list(ours) == list(plain) and len(ours) > 2
    apart = [ours[problem] - plain[problem] for problem in ours]
    n, mean = len(apart), sum(apart) / len(apart)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in apart) / (n - 1))
    deviation = max(deviation, math.sqrt(1 / n) / 4)  # one of 4 samples of one problem
    half = stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)
    (pair,) = found["differences"]
    assert pair["difference"] == pytest.approx(abs(mean))
    assert pair["high"] - pair["low"] == pytest.approx(2 * half)
    assert pair["num_problems"] == n
    better = "ours" if mean >= 0 else "plain"
    assert pair["arm"] == better
    for row, rate in zip(found["arms"], (ours, plain), strict=True):
        assert row["accuracy"] == pytest.approx(sum(rate.values()) / n)
        assert f"{100 * row['accuracy']:.1f}" in out
    assert f"{100 * abs(mean):+.1f}" in out and "taopd report" in out
    assert f"{100 * abs(mean):+.1f}" in (tmp_path / "out/comparison.md").read_text()
    # The same folders make the report's outcome.
    page = tmp_path / "page.html"
    assert main(["report", *folders, "-o", str(page)]) == 0
    assert f"{100 * abs(mean):+.1f}".replace("-", "\N{MINUS SIGN}") in page.read_text()


def test_an_evaluation_is_of_its_run_from_every_folder_and_behind_links(
    lab, micro_lab, tmp_path, monkeypatch
):
    """Graded by a relative path through a link, looked at from elsewhere."""
    (tmp_path / "link").symlink_to(lab / "ours")
    monkeypatch.chdir(tmp_path)
    grade("link/model", micro_lab, tmp_path / "graded")
    place = tmp_path / "elsewhere"
    (place / "link").mkdir(parents=True)
    monkeypatch.chdir(place)
    # What the path as typed leads to here is another run.
    shutil.copytree(lab / "plain", place / "link", dirs_exist_ok=True)
    found = read_folders([Path("link"), lab / "ours"])
    assert owner_of(read_evaluation(tmp_path / "graded"), found.runs) is found.runs[1]


def test_the_command_that_a_message_gives_can_be_typed(lab, tmp_path, capsys):
    run = tmp_path / "a run's"
    run.symlink_to(lab / "ours")
    assert main(["compare", str(run), str(lab / "plain")]) == 2
    command = re.search(r"first: (taopd evaluate .*) See", capsys.readouterr().err)[1]
    words = shlex.split(command.removesuffix("."))
    assert words[2] == f"{run}/model" and words[-1] == f"{run}-eval"


def test_what_does_not_fit_together_is_one_message(lab, micro_lab, tmp_path, capsys):
    ours = str(lab / "ours-eval")
    cases = {
        "graded by 'regex:": ["--match", "exact"],
        "cut at 4 tokens in one, at 3": ["--max-new-tokens", "3"],
        "no two of these evaluations decoded in the same way": ["--temperature", "0.5"],
    }
    for words, more in cases.items():
        other = tmp_path / f"other-{len(list(tmp_path.iterdir()))}"
        grade(lab / "plain/model", micro_lab, other, *more)
        capsys.readouterr()
        assert main(["compare", ours, str(other), "--output", str(tmp_path / "never")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not (tmp_path / "never").exists()
    alien = evaluation(tmp_path / "alien", "m", [True, False], first=70)
    same = evaluation(tmp_path / "same", "n", [True, False])
    assert main(["compare", str(alien), str(same)]) == 2
    error = capsys.readouterr().err
    assert "2 and 2 problems, 0 in common" in error and "alien" in error and "same" in error


def test_runs_without_an_evaluation_are_told_the_command(lab, capsys):
    argv = [str(lab / name) for name in ("ours", "plain", "ours-eval")]
    assert main(["compare", *argv]) == 2
    error = capsys.readouterr().err
    command = re.search(
        r"taopd (evaluate \S+/plain/model --dataset \S+ --match '\S+').* --output", error
    )
    assert command is not None
    for flag in (["--resume"], ["--workers", "2"], ["--list"]):
        assert main(["compare", *argv, *flag]) == 2
        assert f"{flag[0]} is for a study file" in capsys.readouterr().err
    assert main(["compare", argv[0], "no-such-folder"]) == 2
    assert "no-such-folder is no folder" in capsys.readouterr().err


def test_equal_models_have_an_interval_too(tmp_path):
    """Oracle: one of 40 problems may differ by chance: 1/40 squared is the mean of the squares."""
    paths = [evaluation(tmp_path / name, name, [True] * 30 + [False] * 10) for name in ("a", "b")]
    (found,) = differences([read_evaluation(path) for path in paths])
    half = stats.t.ppf(0.975, 39) * math.sqrt(1 / 40) / math.sqrt(40)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-half, half))
    assert half == pytest.approx(2 / 40, rel=0.02)


def test_a_study_stands_beside_them(lab, tmp_path, capsys):
    """A study's own table comes first; its arms need no evaluation."""
    study = tmp_path / "study"
    outcome = {"budget": 0.1, "accuracy_greedy": 0.5, "accuracy_curve": [[0, 0.25], [9, 0.5]]}
    for name, selector in (("full", "full"), ("random", "random")):
        folder = study / "arms" / f"{name}-seed0"
        folder.mkdir(parents=True)
        row = outcome | {"name": name, "selector": selector, "seed": 0}
        (folder / "results.json").write_text(json.dumps(row))
    assert main(["compare", str(study), "--output", str(tmp_path / "done")]) == 0
    folders = [str(tmp_path / "done"), str(lab / "ours-eval"), str(lab / "plain-eval")]
    capsys.readouterr()
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert out.index("held-out greedy accuracy") < out.index("On the same problems")
    assert main(["compare", folders[0], str(lab / "ours")]) == 0


def test_an_output_that_is_an_input_is_never_emptied(lab, micro_lab, capsys):
    """Oracle: every file that was there still is."""
    before = sorted(lab.rglob("*"))
    both, data = [str(lab / "ours-eval"), str(lab / "plain-eval")], str(micro_lab.prompts)
    for argv, read in (
        (["compare", *both, "--output", both[0]], both[0]),
        (
            ["evaluate", str(lab / "ours/model"), "--dataset", data, "--output", str(lab / "ours")],
            "model",
        ),
        (
            [
                *("train", "--config", str(lab / "config.yaml"), "--output_dir", str(lab / "ours")),
                *("--model_name_or_path", str(lab / "ours/checkpoint-2")),
            ],
            "checkpoint-2",
        ),
    ):
        assert main([*argv, "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert f"{read}, which is read here and which --overwrite would remove" in error
    assert sorted(lab.rglob("*")) == before


def test_a_run_in_place_of_its_model_and_a_folder_twice(lab, micro_lab, tmp_path, capsys):
    run, data = str(lab / "ours"), str(micro_lab.prompts)
    assert main(["evaluate", run, "--dataset", data]) == 2
    assert f"the student of this run is {run}/model" in capsys.readouterr().err
    assert main(["compare", f"{run}-eval", f"{run}-eval/"]) == 2
    assert f"{run}-eval/ is given twice, first as {run}-eval" in capsys.readouterr().err
    assert main(["compare", run]) == 2
    assert "taopd compare FOLDER FOLDER" in capsys.readouterr().err
    for argv in (["compare", "recipes/studies/tiny.yaml", "--resume"], ["demo", "--resume"]):
        assert main([*argv, "--output", run]) == 2
        assert "holds a run of `taopd train`" in capsys.readouterr().err
