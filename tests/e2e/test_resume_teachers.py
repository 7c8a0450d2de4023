"""Resuming a run with several teachers: what changes nothing, and what another start must not change.

Oracle: the weights of the run without an interruption, to the bit.
"""

import json
import logging
import shutil

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from taopd import cli
from tests.conftest import make_model
from tests.e2e.test_trainer import CPU, OURS, weights_of
from tests.e2e.test_two_teachers import SAMPLED, make_trainer, rows_of, trained, two_teachers
from tests.scripted_server import ScriptedServer

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}


@pytest.fixture(scope="module")
def paths(micro_lab, tmp_path_factory):
    """Of different widths: read by the other's number, a batch would not fit."""
    return two_teachers(micro_lab, tmp_path_factory.mktemp("other") / "other")


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def python_run(micro_lab, paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "run"
    trainer = make_trainer(micro_lab, folder, paths, **STEPS)
    trained(trainer)
    return folder, weights_of(trainer)


def resumed(python_run, tmp_path, micro_lab, teachers, *, step=2, rows=None, **settings):
    folder = tmp_path / "run"
    shutil.copytree(python_run[0], folder)
    trainer = make_trainer(micro_lab, folder, teachers, rows, **(STEPS | settings))
    trained(trainer, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return weights_of(trainer)


@pytest.mark.parametrize("step", [1, 2])  # within a generation batch, and between two
def test_the_order_of_a_mapping_changes_nothing(
    python_run, micro_lab, paths, tmp_path, step, caplog
):
    """A batch in a checkpoint names its teachers by number."""
    turned = dict(reversed(paths.items()))
    found = resumed(python_run, tmp_path, micro_lab, turned, step=step)
    assert equal(found, python_run[1])
    assert "other inputs" not in caplog.text


def halves(length):
    return ["math" if index < length // 2 else "code" for index in range(length)]


CHANGES = {
    "other weights": ({"swap": True}, "teacher 'code' has other weights than at the start"),
    "one more": ({"add": "x"}, "the teachers were code, math and are code, math, x"),
    "one less": (
        {"drop": "code", "names": ["math"] * 24},
        "the teachers were code, math and are math",
    ),
    "the column": ({"names": halves(24)}, "other prompts, or other values in the columns"),
    "fewer rows": ({"rows": 16}, "the training set had 24 rows and has 16"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_teacher_or_column_is_said_in_python(
    python_run,
    micro_lab,
    paths,
    tmp_path,
    case,
    caplog,
):
    change, words = CHANGES[case]
    teachers = {name: path for name, path in paths.items() if name != change.get("drop")}
    if "swap" in change:
        teachers = {"code": paths["math"], "math": paths["code"]}
    if "add" in change:
        teachers[change["add"]] = paths["math"]
    rows = rows_of(micro_lab, change.get("names")).select(range(change.get("rows", 24)))
    resumed(python_run, tmp_path, micro_lab, teachers, rows=rows)
    (line,) = [each.message for each in caplog.records if "other inputs" in each.message]
    assert words in line


def test_a_batch_of_other_teachers_is_refused(python_run, micro_lab, paths, tmp_path):
    """Its numbers would mean others."""
    more = paths | {"a": paths["math"]}
    with pytest.raises(
        Exception, match="in the middle of a generation batch of the teachers code, math"
    ):
        resumed(python_run, tmp_path, micro_lab, more, step=1)


@pytest.fixture(scope="module")
def command_run(micro_lab, paths, tmp_path_factory):
    """A finished run of `taopd train` whose teachers and prompts are files of its own."""
    root = tmp_path_factory.mktemp("command")
    for name, path in paths.items():
        shutil.copytree(path, root / name)
    frame = pd.DataFrame(list(rows_of(micro_lab)))
    frame.to_parquet(root / "prompts.parquet")
    settings = (
        CPU
        | OURS
        | {
            "model_name_or_path": str(micro_lab.student),
            "teachers": {name: {"model": str(root / name)} for name in paths},
            "dataset_name": str(root / "prompts.parquet"),
            "output_dir": str(root / "run"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 3,
            "budget": 0.3,
        }
    )
    assert train(root, settings) == 0
    return root, settings, frame


def train(root, settings, *flags):
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    argv = ["train", "--config", str(root / "config.yaml"), "--quiet", "--skip-check", *flags]
    return cli.main(argv)


def cut(root):
    """The run as it was after its first step; its last weights."""
    whole = load_file(root / "run/checkpoint-3/model.safetensors")
    for name in ("checkpoint-2", "checkpoint-3", "model"):
        shutil.rmtree(root / "run" / name)
    (root / "run/results.json").unlink()
    return whole


def test_files_that_were_written_over_are_refused_and_can_be_accepted(command_run, capsys, caplog):
    root, settings, frame = command_run
    whole = cut(root)
    # Refused, one after the other; what is in the run folder stays.
    swapped = frame.assign(teacher=frame.teacher.map({"code": "math", "math": "code"}))
    swapped.to_parquet(root / "prompts.parquet")
    assert train(root, settings, "--resume") == 2
    assert "the training set holds other prompts, or other values" in capsys.readouterr().err
    frame.to_parquet(root / "prompts.parquet")
    other = make_model(seed=99, hidden_size=24, layers=1)
    shutil.move(root / "code", root / "kept")
    shutil.copytree(root / "kept", root / "code")
    other.save_pretrained(root / "code")
    assert train(root, settings, "--resume") == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert "teacher 'code' has other weights than at the start" in line
    assert "--resume-with-changes" in line
    # A teacher of the same weights elsewhere, in the other order and without what does not train.
    shutil.rmtree(root / "code")
    shutil.move(root / "kept", root / "code")
    turned = settings | {"teachers": dict(reversed(settings["teachers"].items()))}
    assert train(root, turned, "--resume") == 0
    assert equal(load_file(root / "run/model/model.safetensors"), whole)
    # Accepted.
    cut(root)
    swapped.to_parquet(root / "prompts.parquet")
    assert train(root, settings, "--resume-with-changes") == 0
    assert "other inputs than it began with" in caplog.text
    frame.to_parquet(root / "prompts.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"codex": t["code"], "math": t["math"]}, r"teachers.codex.model None -> '"),
        (lambda t: {"math": t["math"]}, r"(teachers.code.model '"),
        (lambda t: t | {"math": t["code"]}, "(teachers.math.model '"),
        (
            lambda t: t | {"math": t["math"] | {"url": "http://127.0.0.1:9"}},
            "teachers.math.url None -> ",
        ),
    ],
    ids=["renamed", "removed", "another", "a server"],
)
def test_the_setting_that_differs_is_named_by_its_path(command_run, capsys, change, words):
    root, settings, _ = command_run
    settings = settings | SAMPLED | {"max_steps": 9}
    before = json.loads((root / "run/config.json").read_text())
    (root / "run/config.json").write_text(json.dumps(before | SAMPLED))
    found = settings | {"teachers": change(settings["teachers"])}
    assert train(root, found, "--resume") == 2
    (root / "run/config.json").write_text(json.dumps(before))
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert words in line and "dict" not in line
    weights = settings | {"teacher_weights": {"code": 0.5}, "loss": before["loss"]}
    assert train(root, weights, "--resume") == 2
    assert "(teacher_weights.code None -> 0.5)" in capsys.readouterr().err


def test_a_server_that_answers_otherwise_after_a_break_is_found(micro_lab, paths, tmp_path, caplog):
    """Its address may change, its model not."""
    caplog.set_level(logging.WARNING)
    before, other = (
        AutoModelForCausalLM.from_pretrained(paths["code"], dtype=torch.float32).eval()
        for _ in "ab"
    )
    for weight in other.parameters():
        weight.data *= 8.0  # surer of itself by nats: a change below 0.2 nats may be a rounding
    settings = STEPS | SAMPLED | {"num_iterations": 1}
    for name, now in (("same", before), ("other", other)):
        folder = tmp_path / name
        with ScriptedServer(before) as server:
            teachers = {"code": {"url": server.url}, "math": {"model": paths["math"]}}
            trained(make_trainer(micro_lab, folder, None, teachers=teachers, **settings))
        with ScriptedServer(now) as server:
            teachers["code"] = {"url": server.url}
            trainer = make_trainer(micro_lab, folder, None, teachers=teachers, **settings)
            trained(trainer, resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert ("teacher 'code' is asked again" in caplog.text) == (now is other)
