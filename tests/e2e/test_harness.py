"""`taopd evaluate --suite` on local task files and the micro model, offline.

Oracles: counting over the saved transcripts, and greedy decoding by `taopd.experiments.evaluation.evaluate`.
"""

import importlib.util
import json

import pytest

from taopd.cli import main
from taopd.errors import ConfigError
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.evaluation.lm_eval import PUBLISHED, check_tasks, parse_suite
from taopd.models.prompts import load_model, load_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'taopd[eval]'",
)
PROBLEMS = [
    {"prompt": f"{left} + {right} =", "answer": f"{left} {right} {left}"}
    for left in range(1, 4)
    for right in range(1, 5)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<unk>"]
  do_sample: false
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


def test_suite_names():
    assert parse_suite("lm-eval:a, b,a") == ["a", "b"]
    assert parse_suite("lm-eval:" + ",".join(PUBLISHED)) == list(PUBLISHED.values())
    for bad in ("helm:a", "lm-eval:", "aime24"):
        with pytest.raises(ConfigError, match="expected lm-eval:TASK"):
            parse_suite(bad)


def test_a_task_that_does_not_exist_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no task 'aime42'.* Did you mean 'aime24'"):
        check_tasks(["ifeval", "aime42"], ["aime24", "ifeval"], None)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_extra_the_message_says_how_to_get_it(micro_lab, capsys):
    assert main(["evaluate", str(micro_lab.student), "--suite", "lm-eval:ifeval"]) == 2
    assert "pip install 'taopd[eval]'" in capsys.readouterr().err


def test_dataset_or_suite_but_not_both(capsys):
    assert main(["evaluate", "x"]) == 2
    assert main(["evaluate", "x", "--dataset", "a.jsonl", "--suite", "lm-eval:ifeval"]) == 2
    neither, both = capsys.readouterr().err.splitlines()
    assert "name what to evaluate on: --dataset FILE or --suite" in neither
    assert "--dataset and --suite exclude each other" in both


@pytest.fixture
def suite(tmp_path, micro_lab, monkeypatch):
    """A folder with one task, whose answers are the model's own greedy ones in every third problem."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model, tokenizer = load_model(micro_lab.student), load_tokenizer(micro_lab.student)
    result = evaluate(model, tokenizer, PROBLEMS, greedy=True, max_new_tokens=4, match="exact")
    rows = [
        problem | ({"answer": transcript["completion"]} if index % 3 == 0 else {})
        for index, (problem, transcript) in enumerate(
            zip(PROBLEMS, result.transcripts, strict=True)
        )
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "additions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "additions.yaml").write_text(TASK.format(name="micro_additions", data=data))
    return folder


@needs_harness
@pytest.mark.slow
def test_a_local_task_end_to_end(suite, micro_lab, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["evaluate", str(micro_lab.student), "--suite", "lm-eval:micro_additions"]
    assert main([*argv, "--suite-path", str(suite), "--output", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    found = results["tasks"]["micro_additions"]["exact_match,none"]
    assert found["value"] == pytest.approx(4 / 12)
    # Twelve 0s and 1s: sample standard deviation over sqrt(12).
    assert found["standard_error"] == pytest.approx((4 / 12 * 8 / 12 / 11) ** 0.5, rel=1e-3)
    assert results["num_problems"] == {"micro_additions": 12}
    assert results["versions"]["micro_additions"] == 3.0 and "lm_eval" in results["versions"]
    assert results["settings"]["generation"]["micro_additions"]["max_gen_toks"] == 4
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["prompt"] for row in rows} == {p["prompt"] for p in PROBLEMS}
    right = [row["completions"][0] == row["answer"] for row in rows]
    assert sum(right) == 4 == sum(row["verdict"]["exact_match"] for row in rows)
    assert "micro_additions" in capsys.readouterr().out  # Not cut at the width of a terminal.


@needs_harness
@pytest.mark.slow
def test_unknown_task_and_folder_write_nothing(suite, micro_lab, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["evaluate", str(micro_lab.student), "--output", str(out), "--suite-path"]
    assert main([*argv, str(suite), "--suite", "lm-eval:micro_aditions"]) == 2
    assert "Did you mean 'micro_additions'?" in capsys.readouterr().err
    assert main([*argv, str(suite / "no"), "--suite", "lm-eval:ifeval"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not out.exists()


@needs_harness
def test_the_published_benchmarks_exist_in_the_harness():
    from lm_eval.tasks import TaskManager

    check_tasks(list(PUBLISHED.values()), TaskManager().all_tasks, None)


@needs_harness
def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "no"), "--suite", "lm-eval:ifeval"]) == 2
    assert "no" in capsys.readouterr().err
