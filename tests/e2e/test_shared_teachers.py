"""Several teachers of the same weights: held once, and otherwise the run of two copies.

Oracle: the same run with two models that were loaded apart.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd import cli
from taopd.errors import ConfigError
from taopd.preflight.machine import _weights
from taopd.preflight.subject import Subject
from taopd.trainer.build.from_settings import load_inputs
from taopd.trainer.build.loaded_teacher import LayerOffload
from taopd.trainer.settings_file import parse_settings
from tests.e2e.test_trainer import weights_of
from tests.e2e.test_two_teachers import NAMES, make_trainer, rows_of, trained


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def storages(models):
    return {
        weight.untyped_storage().data_ptr() for model in models for weight in model.parameters()
    }


CASES = {
    "plain": {},
    "a share each": {"budget_scope": "teacher", "teacher_weights": {"code": 0.5}},
    "sampled loss": {"loss": "sampled_reverse_kl"},
}


@pytest.mark.parametrize("case", CASES)
def test_two_names_of_a_folder_are_one_model_and_the_run_of_two(micro_lab, tmp_path, case):
    path, seen, trainers = str(micro_lab.teacher), {}, {}
    rows = rows_of(micro_lab)
    # What tells the two apart: each has prompts of its own.
    prompts = [f"{'w3' if name == 'code' else 'w4 w5'} =" for name in rows["teacher"]]
    rows = rows.add_column("teacher_prompt", prompts)
    ways = {
        "shared": {"code": path, "math": f"{path}/"},
        "one object": dict.fromkeys(NAMES, loaded(path)),
        "two": {name: loaded(path) for name in NAMES},
    }
    for way, teachers in ways.items():
        trainers[way] = make_trainer(micro_lab, tmp_path / way, teachers, rows=rows, **CASES[case])
        (seen[way],) = trained(trainers[way])
    own = {way: storages(trainer._teacher.plains) for way, trainer in trainers.items()}
    assert len(own["shared"]) == len(own["one object"]) == len(own["two"]) / 2
    for way in ("shared", "one object"):
        assert torch.equal(seen[way].choice.selection.kept, seen["two"].choice.selection.kept)
        logs = [trainers[one].state.log_history[0] for one in (way, "two")]
        named = {key for key in logs[1] if key.startswith(("loss", "teacher/"))}
        assert "loss" in named and {f"teacher/kept_fraction/{name}" for name in NAMES} <= named
        assert {key: logs[0][key] for key in named} == {key: logs[1][key] for key in named}
        for name, value in weights_of(trainers["two"]).items():
            assert torch.equal(weights_of(trainers[way])[name], value)


def test_one_model_with_and_without_offload_is_refused(micro_lab, tmp_path):
    one = dict.fromkeys(NAMES, loaded(micro_lab.teacher))
    entries = {"code": {"model": "x", "offload": "cpu"}, "math": {"model": "x"}}
    with pytest.raises(ConfigError, match=r"'math'.*offload is set for one of them only"):
        make_trainer(micro_lab, tmp_path, one, teachers=entries)


def test_an_offloaded_model_of_two_names_moves_once(micro_lab, tmp_path, monkeypatch):
    """The hooks that move its layers are on them once; on a CPU the device is stood in for."""
    made = []
    monkeypatch.setattr(
        "taopd.trainer.build.loaded_teacher.place_teacher",
        lambda _accelerator, teacher, _args: (
            teacher,
            made.append(LayerOffload(teacher, "cpu")) or made[-1],
        ),
    )
    one = dict.fromkeys(NAMES, str(micro_lab.teacher))
    trainer = make_trainer(micro_lab, tmp_path, one, teacher_offload="cpu")
    assert len(made) == 1 and {id(trainer.teacher_source(name).offload) for name in NAMES} == {
        id(made[0])
    }


KINDS = [
    ({"model": "T"}, {"model": "T/"}, 1),
    ({"model": "T"}, {"model": "T", "init_kwargs": {"dtype": "float32"}}, 1),
    ({"model": "T"}, {"model": "T", "init_kwargs": {"dtype": "bfloat16"}}, 2),
    ({"model": "T"}, {"model": "T", "init_kwargs": '{"dtype": "bfloat16"}'}, 2),
    ({"model": "T"}, {"model": "T", "offload": "cpu"}, 2),
    ({"model": "T"}, {"model": "S"}, 2),
]


@pytest.mark.parametrize(("code", "math", "number"), KINDS)
def test_settings_load_and_plan_what_differs(micro_lab, tmp_path, capsys, code, math, number):
    """The plan counts as many models as are loaded; oracle: the bytes of the loaded weights."""
    places = {"T": micro_lab.teacher, "T/": f"{micro_lab.teacher}/.", "S": micro_lab.student}
    entries = [entry | {"model": str(places[entry["model"]])} for entry in (code, math)]
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model_name_or_path: {micro_lab.student}\ndataset_name: {tmp_path / 'p.parquet'}\n"
        f"output_dir: {tmp_path}/r\nuse_cpu: true\nbf16: false\ndtype: float32\nmax_completion_length: 6\n"
        f"per_device_train_batch_size: 8\ngradient_accumulation_steps: 1\n"
        f"teachers: {json.dumps(dict(zip(NAMES, entries, strict=True)))}\n"
    )
    rows_of(micro_lab).to_parquet(tmp_path / "p.parquet")
    settings = parse_settings(str(path), [])
    found = list(load_inputs(settings).teacher.values())
    assert len({id(model) for model in found}) == number
    assert len(storages(found)) == number * len(storages(found[:1]))
    held = {w.data_ptr(): w.numel() * w.element_size() for m in found for w in m.parameters()}
    assert cli.main(["plan", "--config", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_mib"]["teacher_weights"]
    assert planned == pytest.approx(sum(held.values()) / 2**20)


def test_the_item_memory_counts_a_shared_model_once(micro_lab, tmp_path):
    rows_of(micro_lab).to_parquet(tmp_path / "p.parquet")
    entry = {"model": str(micro_lab.teacher)}
    flags = {
        "model_name_or_path": micro_lab.student,
        "teachers": json.dumps(dict.fromkeys(NAMES, entry)),
        "dataset_name": tmp_path / "p.parquet",
        "output_dir": tmp_path / "r",
        "use_cpu": "true",
        "bf16": "false",
    }
    flags = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    parts = Subject(settings=parse_settings(None, flags)).parts
    weights = [_weights(part) for part in parts.values()]
    assert weights[0] == weights[1] is not None
