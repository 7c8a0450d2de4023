"""`chat_template_kwargs` of a run in all that samples from its student. Oracle: the ids of the prompts.

A student that was trained not to think was graded with prompts that let it think.
"""

import json
import shutil

import pytest
from datasets import Dataset

from taopd import cli
from taopd.diagnose.bank import FixedContextBank
from taopd.experiments.arm import run_arm
from taopd.experiments.arm_settings import Arm
from taopd.experiments.evaluation import evaluate as evaluation
from taopd.report.evaluations import read_evaluation, unlike
from taopd.runs.folder import template_options
from tests.conftest import WORDS, make_rows, make_tokenizer, write_config
from tests.e2e.test_trainer import CPU, OURS

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if quiet %}w3 {% endif %}"
    "{% if add_generation_prompt %}w7{% endif %}"
)
QUIET = [WORDS.index("w3"), WORDS.index("w7")]
FEW = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 1}


@pytest.fixture
def config(micro_lab, tmp_path):
    """A run of a student with a chat template, quiet by its settings."""
    for name in ("student", "teacher"):
        folder = shutil.copytree(getattr(micro_lab, name), tmp_path / name)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    rows = make_rows(8, "train") + make_rows(8, "test")
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return write_config(
        micro_lab,
        tmp_path,
        model_name_or_path=str(tmp_path / "student"),
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        dataset_name=str(tmp_path / "rows.parquet"),
        **FEW
        | {"save_strategy": "steps", "save_steps": 1, "chat_template_kwargs": {"quiet": True}},
    )


@pytest.fixture
def ends(monkeypatch):
    """The last two tokens of every prompt that is evaluated."""
    found, generate = [], evaluation.generate_ids

    def spy(model, prompts, settings):
        found.extend(ids[-2:] for ids in prompts)
        return generate(model, prompts, settings)

    monkeypatch.setattr(evaluation, "generate_ids", spy)
    return found


@pytest.mark.parametrize("place", ["model", "checkpoint-1"])
def test_a_student_is_evaluated_with_the_prompts_of_its_run(config, tmp_path, ends, capsys, place):
    assert cli.main(["train", "--config", str(config), "--quiet", "--skip-check"]) == 0
    # The micro student's folder is of no run, as a model from elsewhere.
    for folder in (tmp_path / "student", tmp_path / "run" / place):
        given = [str(folder), "--dataset", str(tmp_path / "rows.parquet"), "--split", "test"]
        out = ["--output", str(tmp_path / f"{folder.name}-eval"), "--max-new-tokens", "2"]
        assert cli.main(["evaluate", *given, *out]) == 0
    assert len(ends) == 16 and all(end[0] != QUIET[0] for end in ends[:8])
    assert ends[8:] == [QUIET] * 8
    assert "chat_template_kwargs {'quiet': True}" in capsys.readouterr().err
    results = json.loads((tmp_path / f"{place}-eval/results.json").read_text())
    assert results["settings"]["chat_template_kwargs"] == {"quiet": True}
    found = [read_evaluation(tmp_path / f"{name}-eval") for name in ("student", place)]
    assert "rendered with chat_template_kwargs {} in one" in unlike(*found)
    assert "rendered" not in unlike(found[1], found[1])


def test_an_arm_of_a_study_is_evaluated_with_the_prompts_it_trains_on(config, tmp_path, ends):
    arm = Arm(
        name="quiet",
        seed=0,
        config=FEW | {"chat_template_kwargs": {"quiet": True}},
        student=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        prompts=str(tmp_path / "rows.parquet"),
        match="exact",
        evaluate_every=1,
        num_test_prompts=2,
    )
    run_arm(arm, tmp_path / "arm")
    assert ends and all(end == QUIET for end in ends)


def test_a_folder_of_no_run_has_no_template_options(tmp_path, micro_lab):
    assert template_options(micro_lab.student) == template_options("org/name") == {}


def test_contexts_of_a_diagnostic_are_rendered_as_in_the_run(config, tmp_path, capsys):
    """Sampled, and read from a file of messages; a row's own options win."""
    assert cli.main(["train", "--config", str(config), "--quiet", "--skip-check"]) == 0
    lines = [
        {"prompt": [{"role": "user", "content": "w1"}], "completion": "w5"} | more
        for more in ({}, {"chat_template_kwargs": {"quiet": False}})
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    models = ["--student", str(tmp_path / "run" / "model"), "--teacher", str(tmp_path / "teacher")]
    sampled = ["--prompts", str(tmp_path / "rows.parquet"), "--num-completions", "3"]
    more = ["--k", "2", "--max-tokens", "2"]
    for name, source in (("sampled", sampled), ("read", ["--completions", str(file)])):
        out = ["--output", str(tmp_path / name)]
        assert cli.main(["diagnose", "freeze", *models, *source, *more, *out]) == 0
        assert "chat_template_kwargs {'quiet': True}" in capsys.readouterr().err
    found = {
        name: [ids[-2:] for ids in FixedContextBank.open(tmp_path / name).rollouts.prompt_ids]
        for name in ("sampled", "read")
    }
    assert found["sampled"] == [QUIET] * 3
    assert found["read"] == [QUIET, [WORDS.index("w1"), QUIET[1]]]
    one_step = ["--prompts", sampled[1], "--batches", "1", "--completions", "2", "--budget", "0.5"]
    out = ["--output", str(tmp_path / "one-step"), "--max-tokens", "2"]
    assert cli.main(["diagnose", "one-step", *models, *one_step, *more[:2], *out]) == 0
    assert "chat_template_kwargs {'quiet': True}" in capsys.readouterr().err
