"""The page about selectors on a real model. Oracles: planted folders of arms."""

import json

import pytest

from scripts.pages.smollm2_cpu import QUESTION, STUDIES, file_of, gathered, kept_of, page
from taopd.experiments.study.file import load_study_file


def study_folder(path, arms, **other):
    """A study's folder: `arms` has which problems each arm and seed gets right."""
    path.mkdir()
    study = load_study_file(file_of(STUDIES[0]))
    question = {name: getattr(study, name) for name in QUESTION} | other
    (path / "config.json").write_text(json.dumps(question))
    versions = {"torch": "1", "transformers": "2", "trl": "3"}
    environment = {"git_commit": "0123456789", "devices": ["a CPU"], "versions": versions}
    (path / "env.json").write_text(json.dumps(environment))
    for (name, seed), right in arms.items():
        folder = path / "arms" / f"{name}-seed{seed}"
        folder.mkdir(parents=True)
        share = right.count("1") / len(right)
        result = {
            **{"name": name, "seed": seed, "base_accuracy": 0.05, "kept_fraction": 0.1},
            **{"accuracy_greedy": share, "accuracy_sampled": share / 2, "train_seconds": 9.0},
            "right_greedy_curve": [[0, "0" * len(right)], [24, right]],
        }
        (folder / "results.json").write_text(json.dumps(result))
        logged = {"loss": 1.0, "perf/cpu_s": 7.0, "perf/peak_memory_mib": 5000.0}
        (folder / "metrics.jsonl").write_text(json.dumps(logged) + "\n")
        line = {"step": 24, "prompt": "user\n2 + 2?<|im_end|>", "tokens": ["4"], "kept": [True]}
        (folder / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    return path


def test_a_later_study_adds_arms_and_what_was_saved_stays(tmp_path):
    first = gathered(
        study_folder(tmp_path / "a", {("full", 0): "1100", ("published-10", 0): "1000"}),
        None,
        kept_of,
    )
    saved = json.loads(json.dumps(first))
    more = study_folder(tmp_path / "b", {("published-10", 0): "1110", ("published-10", 1): "0000"})
    both = gathered(more, saved, kept_of)
    ends = {(arm["name"], arm["seed"]): arm["accuracy_greedy"] for arm in both["arms"]}
    # An arm that was run again replaces itself.
    assert ends == {("full", 0): 0.5, ("published-10", 0): 0.75, ("published-10", 1): 0.0}
    text = page(both, STUDIES[0])
    assert "| published-10 | 5 | 37.5 | 0: 75, 1: 0 |" in text
    # By problem of the one seed that both have: 0, 0, 1, 0.
    assert "| published-10 - full | 1 | +25.0 |" in text
    assert "> 2 + 2?\n>\n> **4**" in text
    assert "Not run: reach-10, random-10" in text
    assert "(smollm2-cpu.png)" in text
    # The other study has other arms.
    assert "Not run: reach-10, anchored-10" in page(both, "smollm2-methods")


def test_arms_of_other_models_are_no_part_of_the_table(tmp_path):
    saved = gathered(study_folder(tmp_path / "a", {("full", 0): "10"}), None, kept_of)
    saved["arms"][0]["base_accuracy"] = 0.04
    with pytest.raises(SystemExit, match=r"full-seed1 began at an accuracy of 0\.05.* 0\.04"):
        gathered(study_folder(tmp_path / "b", {("full", 1): "10"}), saved, kept_of)


def test_arms_of_another_question_are_no_part_of_the_table(tmp_path):
    saved = gathered(study_folder(tmp_path / "a", {("full", 0): "1"}), None, kept_of)
    other = study_folder(tmp_path / "b", {("full", 1): "1"}, num_test_prompts=7)
    with pytest.raises(SystemExit, match="differ in num_test_prompts"):
        gathered(other, saved, kept_of)
