"""The page about a model as its own teacher. Oracles: kinds named by hand, planted results, a micro study."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

from scripts.pages import self_teacher, smollm2_cpu
from scripts.pages.kinds_of_tokens import added, by_kind, counts, kinds
from scripts.smollm2_self import EXAMPLES, STUDIES, SYSTEM
from taopd.experiments.arm import run_arm
from taopd.experiments.arm_settings import write_arm
from taopd.experiments.evaluation.grading import Grader
from taopd.experiments.smollm2 import word_problems
from taopd.experiments.study.file import load_study_file, parse_study_file
from taopd.experiments.study.run import plan_study
from taopd.runs.jsonl import write_json
from taopd.trainer.environment import environment

ARMS = [
    {"name": "full", "selector": "full"},
    {"name": "published-10", "selector": "teachability"},
    {"name": "reach-10", "selector": "teachability", "method": "reach"},
    {"name": "random-10", "selector": "random"},
]
ASKED = "Tom has 4 boxes with 7 pens each and finds 5 more pens."


def line(*labelled, truncated=False):
    """A rollout of (token, kind) pairs; every D is 1, every C is 0.5, digits are kept."""
    tokens = [token for token, _ in labelled]
    return {
        "prompt": ASKED,
        "teacher_prompt": f"{ASKED} 4*7=28. 28+5=33.",
        "truncated": truncated,
        "tokens": tokens,
        "disagreement": [1.0] * len(tokens),
        "compatibility": [0.5] * len(tokens),
        "kept": [token.isdigit() for token in tokens],
    }


def test_every_token_has_the_kind_that_a_reader_gives_it():
    labelled = [
        *[("4", "begin"), ("*", "operator"), ("7", "number"), ("=", "operator")],
        *[("2", "told"), ("8", "told"), (".", "rest"), ("Ġ", "rest")],
        *[("2", "number"), ("8", "number"), ("+", "operator"), ("5", "number")],
        # 35 is not in the context; 5 is, and in the student's prompt as well.
        *[("Ġ=", "operator"), ("Ġ3", "result"), ("5", "result"), ("ĠAnswer", "word")],
        *[("Ċ", "rest"), ("=5", "result"), ("<|im_end|>", "end")],
    ]
    assert kinds(line(*labelled)) == [kind for _, kind in labelled]
    cut = line(("So", "begin"), ("Ġhe", "word"), truncated=True)
    assert kinds(cut) == ["begin", "word"]
    assert kinds(line(("<|im_end|>", "end"))) == ["end"]


def test_shares_means_and_kept_tokens_by_kind():
    one = line(("4", "begin"), ("=", "operator"), ("2", "told"), ("8", "told"), truncated=True)
    other = line(("So", "begin"), ("3", "number"), (".", "rest"), (".", "rest"), truncated=True)
    one["disagreement"] = [0.0, 1.0, 4.0, 2.0]
    one["kept"], one["teacher_prompt"] = [False, False, True, False], "28"
    other["disagreement"], other["kept"] = [1.0, 0.0, 0.0, 0.0], [True, False, False, False]
    found = by_kind(counts([one, other]))
    assert list(found) == ["begin", "told", "number", "operator", "rest"]
    assert found["told"] == {
        **{"tokens": 2, "share": 0.25, "disagreement": 3.0, "compatibility": 0.5},
        **{"share_of_disagreement": pytest.approx(0.75), "kept": 0.5},
    }
    assert found["begin"]["kept"] == 0.5 and found["rest"]["kept"] == 0.0
    assert added([counts([one]), counts([other])]) == counts([one, other])


def outcome(name, seed, right):
    return {
        "name": name,
        "seed": seed,
        "right_greedy_curve": [[0, "0" * len(right)], [2, right]],
        "accuracy_greedy": right.count("1") / len(right),
    }


def test_a_loss_is_the_first_thing_said():
    n = 40
    arms = {
        "full-seed0": outcome("full", 0, "1" * n),
        "published-10-seed0": outcome("published-10", 0, "1" * 20 + "0" * 20),
        "random-10-seed0": outcome("random-10", 0, "0" * n),
    }
    assert self_teacher.verdict(arms).startswith("**The method loses** to all tokens here")
    arms["full-seed0"] = outcome("full", 0, "1" * 20 + "0" * 20)
    assert self_teacher.verdict(arms).startswith(
        "A tenth of the tokens, chosen by teachability, wins"
    )
    arms["random-10-seed0"] = outcome("random-10", 0, "0" * 20 + "1" * 20)
    assert "shows no gain over random tokens" in self_teacher.verdict(arms)
    del arms["full-seed0"]
    assert self_teacher.verdict(arms).startswith("**Not finished.**")


def test_differences_take_a_problems_mean_over_the_seeds_that_both_have():
    arms = {
        "a": outcome("published-10", 0, "1100"),
        "b": outcome("published-10", 1, "1000"),
        "c": outcome("random-10", 0, "0100"),
        "d": outcome("random-10", 1, "0000"),
        "e": outcome("full", 1, "1010"),
    }
    found = smollm2_cpu.paired(arms)
    # By problem: 1, 0, 0, 0 of both seeds; of seed 1 alone 0, 0, -1, 0.
    assert found["published-10", "random-10"].mean == pytest.approx(0.25)
    assert found["published-10", "full"].mean == pytest.approx(-0.25)
    assert ("reach-10", "published-10") not in found


def micro_study(micro_lab, folder, seeds):
    rows = pd.read_parquet(micro_lab.prompts)
    rows["teacher_prompt"] = rows["answer"] + " " + rows["prompt"]
    rows.to_parquet(folder / "prompts.parquet")
    study = {
        **{"student": str(micro_lab.student), "teacher": "self"},
        **{"prompts": str(folder / "prompts.parquet"), "match": "exact"},
        **{"arms": ARMS, "seeds": seeds, "evaluate_every": 2, "num_test_prompts": 8},
        **{"random_control": False, "full_control": False},
    }
    config = {
        **{"max_steps": 2, "max_completion_length": 6, "per_device_train_batch_size": 4},
        **{"score_top_k": 4, "logging_steps": 1, "log_rollouts": 4},
        **{"gradient_checkpointing": False, "method": "published", "budget": 0.25},
    }
    return plan_study(parse_study_file(study | {"config": config}))


def test_the_page_of_a_study_that_runs_and_of_a_finished_one(micro_lab, tmp_path):
    run = tmp_path / "self"
    run.mkdir()
    plan = micro_study(micro_lab, tmp_path, [0, 1])
    write_json(run / "config.json", asdict(plan.study))
    write_json(run / "env.json", environment() | {"git_commit": "0123456789"})
    for each in plan.runs[:4]:
        write_arm(each, plan.folder_of(each, run))
        run_arm(each, plan.folder_of(each, run))
    write_arm(plan.runs[4], plan.folder_of(plan.runs[4], run))  # an arm that has begun
    saved = self_teacher.gathered(run, None)
    text = self_teacher.page({"form": json.loads(json.dumps(saved))})
    assert "8 held-out problems" in text and "was not measured" in text
    assert text.count("Not run.") == 2  # the other studies
    table = [row.split("|")[1:-1] for row in text.split("kept by")[-1].splitlines()[2:]]
    table = table[: next(i for i, row in enumerate(table) if not row)]
    shares = [float(row[1]) for row in table]
    assert sum(shares) == pytest.approx(100.0, abs=0.5)
    # D over all rollouts of the first steps, as the files have it.
    lines = [
        json.loads(text)
        for path in run.glob("arms/*/rollouts.jsonl")
        for text in path.read_text().splitlines()
    ]
    rests = [
        d
        for each in lines
        for d, k in zip(each["disagreement"], kinds(each), strict=True)
        if k == "begin"
    ]
    begin = next(row for row in table if "first token" in row[0])
    assert float(begin[2]) == pytest.approx(sum(rests) / len(rests), abs=0.006)
    helps = {"problems": 60, "model": "instruct", "accuracy": {"without": 0.0, "with": 0.95}}
    write_json(tmp_path / "prompts.json", helps)
    figures = {"tokens": 40, "with_without_nats": 0.4, "without_with_nats": 0.5}
    write_json(run / "check.json", {"items": [{"item": "teacher context", "figures": figures}]})
    measured = self_teacher.gathered(run, saved)
    text = self_teacher.page({"form": measured, "system": measured})
    assert text.count("right in 0 % without the context and in 95 % with it") == 2
    assert "KL(with its context || without) is 0.40 nats a token, the other way round 0.50" in text
    # What was measured once stays when the folder of a later study lacks it.
    (run / "check.json").unlink()
    assert self_teacher.gathered(run, measured)["check"] == measured["check"]


def test_a_study_without_the_published_arm_has_no_tables(micro_lab, tmp_path):
    run = tmp_path / "self"
    run.mkdir()
    plan = micro_study(micro_lab, tmp_path, [0])
    write_json(run / "config.json", asdict(plan.study))
    write_json(run / "env.json", environment() | {"git_commit": "0123456789"})
    saved = self_teacher.gathered(run, None)
    assert "Not run yet: published-10" in self_teacher.page({"untouched": saved})


@pytest.mark.parametrize("name", STUDIES)
def test_the_teachers_prompts_of_the_real_studies_end_with_the_students_question(name):
    (problem,) = word_problems.splits(3, sft=0, train=1, test=0)["train"]
    row = {"prompt": problem.prompt, "solution": problem.solution, "answer": problem.answer}
    made = STUDIES[name](row)
    assert made["prompt"] == problem.prompt and made["teacher_prompt"][-1] == problem.prompt[-1]
    grade = Grader(load_study_file(f"recipes/studies/smollm2-{name}.yaml").match)
    assert grade(problem.solution, made["answer"]).correct
    wrong = problem.solution.replace("Answer: ", "Answer: 9")
    assert grade(wrong, made["answer"]).correct == (name == "system")
    assert not grade(f"The answer is {problem.answer}.", made["answer"]).correct


def test_the_examples_of_the_system_prompt_are_right_and_of_the_form():
    grade = Grader(load_study_file("recipes/studies/smollm2-system.yaml").match)
    for question, things, sums, answer in EXAMPLES:
        assert things in question and f"{sums}. Answer: {answer}" in SYSTEM
        assert grade(f"{sums}. Answer: {answer}", "Answer:").correct
        for part in sums.split(". "):
            left, right = part.split("=")
            assert eval(left) == int(right)
        assert sums.endswith(f"={answer}")
