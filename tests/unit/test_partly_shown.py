"""What is read in part or not at all is said: extended studies, flags without effect, long rollouts.

Oracles: the arms that were written, counted by hand; the words as printed.
"""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from taopd.cli import main
from taopd.diagnose.bank import tokenizer_fingerprint
from taopd.experiments.study.file import parse_study_file
from taopd.experiments.study.finished import analyse_finished
from taopd.report import comparison, rollouts
from taopd.report.arms import owner_of
from taopd.report.bank_rollouts import bank_rollouts
from taopd.report.evaluations import differences, read_evaluation
from taopd.report.folders import Run, Sources, read_folders
from taopd.report.sections import evaluated, learnable, selected, training
from taopd.report.sections.headline import headline
from tests.browser import synthetic
from tests.unit.study_simulation import outcome
from tests.unit.test_report_meets import evaluation

ARMS = (("full", "full", 1.0), ("random@10%", "random", 0.1))


def study(folder, *, seeds, finished, arms=ARMS, command="compare"):
    """A study's folder as it is while the study runs, or after it was stopped."""
    question = {"equal": "steps", "amount": 10, "metric": "greedy", "collapse_points": 20.0}
    controls = {name: {"full": None, "random": None} for name, *_ in arms}
    config = {"command": command, "seeds": list(seeds)}
    config |= {"question": question, "controls": controls} if command == "compare" else {}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, selector, budget in ARMS:
        for seed in finished:
            place = folder / "arms" / f"{name}-seed{seed}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "arm.json").write_text(json.dumps({"name": name, "seed": seed}))
            row = outcome(name, selector, budget, seed, 0.5 + 0.1 * seed)
            (place / "results.json").write_text(json.dumps(row))
    return folder


def test_a_study_with_more_seeds_than_before_shows_those_that_have_finished(tmp_path, capsys):
    folder = study(tmp_path / "s", seeds=[0], finished=[0])
    assert main(["compare", str(folder)]) == 0
    (folder / "so-far" / "results.json").rename(folder / "results.json")
    assert read_folders([folder]).studies[0].results["seeds"] == [0]
    study(folder, seeds=[0, 1, 2], finished=[1])
    (found,) = read_folders([folder]).studies
    assert found.results["seeds"] == [0, 1] and found.results["unfinished"] == 2
    assert "So far, " in headline(Sources(studies=[found]))
    capsys.readouterr()
    assert main(["compare", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not finished: 4 of 6 arms and seeds are here" in said


def test_a_finished_study_is_shown_as_it_is_and_nothing_is_written(tmp_path, capsys):
    folder = study(tmp_path / "s", seeds=[0, 1], finished=[0, 1])
    assert main(["compare", str(folder)]) == 0
    shown = capsys.readouterr().out
    for file in (folder / "so-far").iterdir():
        file.rename(folder / file.name)
    (folder / "so-far").rmdir()
    there = sorted(path.name for path in folder.iterdir())
    assert main(["compare", str(folder)]) == 0
    assert capsys.readouterr().out == shown.replace("/so-far", "")
    assert sorted(path.name for path in folder.iterdir()) == there
    # A run beside it has no evaluation, and is not passed over without a word.
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["compare", str(folder), str(tmp_path / "alone")]) == 0
    assert "not compared, which takes two evaluations: alone" in capsys.readouterr().out
    # A damaged file is one line, alone and beside another folder.
    results = json.loads((folder / "results.json").read_text())
    del results["noise_floor"]["words"]
    (folder / "results.json").write_text(json.dumps(results))
    for more in ([], [str(tmp_path / "alone")]):
        assert main(["compare", str(folder), *more]) == 2
        assert "results.json, noise_floor: 'words' is missing" in capsys.readouterr().err


def test_arms_and_seeds_that_a_study_has_no_more_are_left_out(tmp_path):
    folder = study(tmp_path / "s", seeds=[0, 1], finished=[0, 1, 2], arms=ARMS[:1])
    results, timings = analyse_finished(folder)
    assert [(arm["name"], arm["num_seeds"]) for arm in results["arms"]] == [("full", 2)]
    assert results["unfinished"] == 0 and len(timings) == 2


@pytest.mark.parametrize("finished", [[0, 1, 2], [2]])
def test_the_page_counts_no_run_of_an_arm_or_a_seed_that_a_study_has_no_more(tmp_path, finished):
    before = study(tmp_path / "s", seeds=finished, finished=finished)
    assert main(["compare", str(before)]) == 0
    (before / "so-far" / "results.json").rename(before / "results.json")
    for place in (before / "arms").iterdir():
        (place / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = study(before, seeds=[0, 1], finished=[], arms=ARMS[:1])
    kept = [seed for seed in (0, 1) if seed in finished]
    (folder / "arms" / "full-seed1").mkdir(exist_ok=True)  # the one that is running
    (folder / "arms" / "full-seed1" / "arm.json").write_text('{"name": "full", "seed": 1}')
    (folder / "arms" / "full-seed1" / "metrics.jsonl").write_text('{"step": 1}\n')
    found = read_folders([folder])
    assert {run.path.name for run in found.runs} == {f"full-seed{seed}" for seed in {*kept, 1}}
    assert [each.results["seeds"] for each in found.studies] == ([kept] if kept else [])


def test_results_that_were_copied_without_their_arms_are_shown(tmp_path):
    folder = study(tmp_path / "s", seeds=[0], finished=[0])
    assert main(["compare", str(folder)]) == 0
    copy = study(tmp_path / "copy", seeds=[0, 1], finished=[])
    (folder / "so-far" / "results.json").rename(copy / "results.json")
    (found,) = read_folders([copy]).studies
    assert found.results["seeds"] == [0]


def test_a_stopped_demo_is_shown(tmp_path):
    folder = study(tmp_path / "s", seeds=[0], finished=[0], command="demo")
    (found,) = read_folders([folder]).studies
    assert [arm["name"] for arm in found.results["arms"]] == ["full", "random@10%"]


def test_the_analysis_of_a_folder_replaces_its_own_and_no_other(tmp_path, capsys):
    folder, out = study(tmp_path / "s", seeds=[0], finished=[0]), tmp_path / "out"
    argv = ["compare", str(folder), "--output", str(out)]
    assert main(argv) == 0
    assert main(argv) == 2 and "start anew with --overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert "left in place" not in capsys.readouterr().err
    assert main(["compare", str(folder), "--output", str(folder), "--overwrite"]) == 2


def test_an_output_that_would_stay_empty_is_refused(tmp_path, capsys):
    done = []
    for name in ("a", "b"):
        folder = study(tmp_path / name, seeds=[0], finished=[0])
        assert main(["compare", str(folder), "--output", str(tmp_path / f"{name}-done")]) == 0
        done.append(str(tmp_path / f"{name}-done"))
    assert main(["compare", *done]) == 0
    assert main(["compare", *done, "--output", str(tmp_path / "c")]) == 2
    assert "there is nothing to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("on", "flag", "words"),
    [
        ("--suite lm-eval:ifeval", "--num-samples 8", "--num-samples is for --dataset"),
        ("--suite lm-eval:ifeval", "--greedy", "--greedy is for --dataset"),
        ("--suite lm-eval:ifeval", "--match exact", "--match is for --dataset"),
        ("--dataset x.jsonl", "--num-fewshot 3", "--num-fewshot is for --suite"),
        ("--dataset x.jsonl", "--chat-template", "--chat-template is for --suite"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(on, flag, words, capsys):
    assert main(["evaluate", "model", *on.split(), *flag.split()]) == 2
    assert words in capsys.readouterr().err


def decoded(folder, name, **settings):
    found = read_evaluation(evaluation(folder / name, name, [True, False, True]))
    return replace(found, results=found.results | {"settings": {"do_sample": True} | settings})


def test_evaluations_that_sampled_otherwise_are_not_compared(tmp_path):
    plain = decoded(tmp_path, "plain", temperature=1.0, top_p=1.0, top_k=0)
    others = [
        decoded(tmp_path, name, **{name: value})
        for name, value in {"temperature": 0.5, "top_p": 0.9, "top_k": 20}.items()
    ]
    assert [one.decoding for one in (plain, others[1])] == ["1 sample", "1 sample, top_p 0.9"]
    assert differences([plain, *others]) == []
    # Of a version that knew neither.
    assert len(differences([plain, decoded(tmp_path, "old", temperature=1.0)])) == 1


def test_no_p_value_is_shown_as_0():
    names = ("arm", "evaluation", "less", "less_evaluation")
    row = dict.fromkeys(names, "x") | dict.fromkeys(("difference", "low", "high"), 0.1)
    (cells,) = comparison.difference_rows(
        {"differences": [row | {"p_holm": 1e-7, "num_problems": 9}]}
    )
    assert cells[4] == "<0.001"


def test_more_pairs_than_the_page_shows_are_counted(tmp_path):
    found = [
        read_evaluation(evaluation(tmp_path / str(n), str(n), [True, False, n > 3]))
        for n in range(6)
    ]
    assert len(list(combinations(found, 2))) == 15
    assert f"The first {evaluated.MOST_PAIRS} of 15 pairs" in evaluated.body(found)
    assert "The first" not in evaluated.body(found[:3])


def gains(folder, *, completions, checkpoints, vocabulary=None):
    """A folder of gains as `taopd diagnose gain` writes it, as far as a report reads it."""
    folder.mkdir()
    rows = 2 * completions
    constants = {"prompt": 0, "token_id": 1, "entropy": 0.1, "disagreement_k4": 0.1}
    tokens = pd.DataFrame({"completion": np.repeat(np.arange(completions), 2)} | constants)
    tokens.to_parquet(folder / "tokens.parquet")
    entries = []
    for index in range(checkpoints):
        pd.DataFrame({"gain_forward": np.zeros(rows)}).to_parquet(folder / f"{index}.parquet")
        entry = {"file": f"{index}.parquet", "label": f"c{index}", "gain_forward_nats/mean": 0.1}
        entries.append(entry)
    prints = {"tokenizer": {"vocabulary": vocabulary}} if vocabulary else {}
    manifest = {"format": "taopd-gain-1", "checkpoints": entries, "fingerprints": prints}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_parts_that_show_the_first_of_many_say_of_how_many(tmp_path):
    line = synthetic.rollout(np.random.default_rng(0), 20, step=0)
    runs = [synthetic.write_run(tmp_path / name, [line]) for name in "abcde"]
    many = [f"t{n}" for n in range(training.MAX_RUNS + 2)]
    metrics = {"step": 1, "loss/selected_nats": 1} | {
        f"teacher/valid_tokens/{name}": 5 for name in many
    }
    (tmp_path / "routed").mkdir()
    (tmp_path / "routed" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    found = read_folders([*runs, tmp_path / "routed"])
    logged = rollouts.read_rollouts(found.runs, limit=50)
    assert "The first 3 of 6 runs that select" in selected.body(found.runs, logged)
    assert "The first" not in selected.body(found.runs[:3], logged)
    assert "The first 8 of 10 teachers" in training.body(found.runs[5:])
    for count, words in ((6, ""), (7, "The first 6 of 7 checkpoints")):
        folder = gains(tmp_path / f"{count}-gain", completions=2, checkpoints=count)
        page = learnable.body(Sources(gains=[folder]))
        assert words in page and (words or "The first" not in page)


def test_every_folder_of_gains_or_banks_has_its_part_of_the_rollouts(tmp_path):
    """Two banks of the usual size: the page had tokens of the first alone."""
    one = gains(tmp_path / "one-gain", completions=30, checkpoints=2)
    two = gains(tmp_path / "two-gain", completions=30, checkpoints=3)
    for sources in (Sources(gains=[one, two]), Sources(banks=[one, two])):
        found = bank_rollouts(sources, limit=40)
        assert Counter(each.run for each in found).keys() == {"one-gain", "two-gain"}
        assert 36 <= len(found) <= 40
    assert len(bank_rollouts(Sources(gains=[two]), limit=2)) == 2


def test_a_bank_is_shown_where_its_own_gains_are_not(tmp_path):
    """Gains of another bank on the page took its place."""
    bank = gains(tmp_path / "bank", completions=2, checkpoints=1)
    own, other = (gains(tmp_path / name, completions=2, checkpoints=1) for name in ("own", "other"))
    for folder, document in (
        (bank, {"sha256": "a"}),
        (own, {"bank_sha256": "a"}),
        (other, {"bank_sha256": "b"}),
    ):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | document))
    for beside, names in ((own, {"own"}), (other, {"other", "bank"})):
        found = bank_rollouts(Sources(gains=[beside], banks=[bank]), limit=10)
        assert {each.run for each in found} == names


def test_the_words_of_a_bank_are_of_no_other_vocabulary(tmp_path):
    """A run of another model on the same page lent its words to the ids of the bank."""
    other, own = ({"model": {"vocab": {"a": 0, word: 1}}} for word in ("wrong", "right"))
    digest = tokenizer_fingerprint(SimpleNamespace(get_vocab=lambda: own["model"]["vocab"]))
    folder = gains(tmp_path / "g", completions=1, checkpoints=1, vocabulary=digest["vocabulary"])
    runs = []
    for name, tokenizer in (("x", other), ("y", own)):
        place = tmp_path / name / "model"
        place.mkdir(parents=True)
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
        runs.append(Run(name=name, path=place.parent))
    for known, piece in ((runs, "right "), (runs[:1], "⟨1⟩ ")):
        (found,) = bank_rollouts(Sources(runs=known, gains=[folder]), limit=5)
        assert found.pieces == [piece] * 2


def test_the_median_of_two_steps_lies_between_them():
    assert training.median([1.0, 100.0]) == 50.5


def logged(folder, num_steps, length):
    folder.mkdir()
    lines = [
        {"step": step, "tokens": ["a"] * length, "completion": n, "prompt": "p"}
        for step in range(num_steps)
        for n in range(2)
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(name=folder.name, path=folder)


def test_long_completions_of_one_run_leave_room_for_the_others_and_for_the_end(tmp_path):
    runs = [logged(tmp_path / name, 20, 50) for name in ("one", "two")]
    found = rollouts.read_rollouts(runs, limit=200, max_tokens=1000)
    assert sum(map(len, found)) <= 1000
    for run in runs:
        steps = [one.step for one in found if one.run == run.name]
        assert len(steps) >= 8 and steps[0] == 0 and steps[-1] == 19
    assert len(rollouts.read_rollouts(runs, limit=200, max_tokens=10)) == 2


@pytest.mark.parametrize(
    "where",
    [
        {"arms": [{"selector": "tip", "lr_scheduler_type": "cosine"}]},
        {"grid": {"selector": ["tip"], "lr_scheduler_type": ["constant", "linear"]}},
    ],
)
def test_no_arm_has_a_schedule_over_steps_that_are_not_equal(where):
    keys = {"lab": "dialect", "seeds": [0], "equal": "seconds", "seconds": 5}
    with pytest.raises(ValueError, match="would differ between arms"):
        parse_study_file(keys | where)


def test_a_model_is_of_the_innermost_run_that_holds_it(tmp_path):
    outer, inner = Run(name="outer", path=tmp_path), Run(name="inner", path=tmp_path / "second")
    model = str(tmp_path / "second" / "model")
    graded = read_evaluation(evaluation(tmp_path / "eval", model, [True, False]))
    assert owner_of(graded, [outer, inner]) is owner_of(graded, [inner, outer]) is inner
    other = read_evaluation(evaluation(tmp_path / "base", "base", [True, True]))
    found = comparison.compare(Sources(runs=[outer, inner], evaluations=[graded, other]))
    assert found["without_evaluation"] == ["outer"]
