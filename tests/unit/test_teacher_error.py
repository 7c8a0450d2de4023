"""The teacher's own error in `taopd check`.

Oracles: KL from both models' own forwards, and the selections of two runs.
"""

import importlib.util
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from taopd import cli
from taopd.models.batch import Positions, Rollouts
from taopd.models.loading import load_model
from taopd.models.offload import LayerOffload
from taopd.models.prompts import load_prompts
from taopd.preflight import teacher_error
from taopd.preflight.measure import run_passes
from taopd.preflight.teacher_error import (
    TeacherError,
    check_teacher_error,
    exact_of,
    kept_tokens,
    measure_error,
)
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_tokenizer, write_config
from tests.e2e.test_trainer import CPU, OURS
from tests.gguf_files import make_llama, write_gguf

installed = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"
)
BUDGET = 0.3
SETTINGS = CPU | OURS | {"per_device_train_batch_size": 4, "budget": BUDGET}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of a teacher with weights large enough for rounding to matter."""
    model = make_llama(seed=1, scale=6.0)
    folder = tmp_path_factory.mktemp("error")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(teacher):
    """The same in Q8_0, in the same folder."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    write_gguf(load_model(teacher), teacher / "q8.gguf", packed=True)
    return teacher / "q8.gguf"


def make_trainer(micro_lab, folder, teacher, **settings):
    return TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=str(teacher),
        args=TeachabilityConfig(output_dir=str(folder), **(SETTINGS | settings)),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
    )


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 40, (n,), generator=generator).tolist() for n in (5, 9, 30, 14, 25, 8)]
    pairs = Rollouts(prompt_ids=[row[:3] for row in rows], completion_ids=[row[3:] for row in rows])
    return pairs.batch()


def positions_of(batch):
    return Positions.of(batch["completion_mask"].bool())


@torch.no_grad()
def logprobs(model, batch):
    """Of every completion token's position, row by row and unpadded."""
    found = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        logits = model.eval()(ids).logits[0, len(prompt) - 1 : -1]
        found.append(logits.double().log_softmax(-1))
    return torch.cat(found)[:, :40].log_softmax(-1)


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def error_of(trainer, kind, batch):
    models = trainer.model_wrapped, trainer.teacher_source("").model
    size = trainer.args.per_device_train_batch_size
    passes = run_passes(trainer.forward_states, *models, batch, size)
    return measure_error(trainer, kind, batch, positions_of(batch), passes)


def both_of(trainer, batch):
    """The signals that the check computes."""
    models = trainer.model_wrapped, trainer.teacher_source("").model
    passes = run_passes(trainer.forward_states, *models, batch, 4)
    at = positions_of(batch)
    ids = batch["completion_ids"][at.row, at.column]
    return exact_of(trainer, *(passes[name].at(at) for name in ("student", "teacher")), ids)


def kept(trainer, batch):
    trainer.model.train()
    _, selected = trainer._with_loss_columns(dict(batch))
    return selected.choice.selection.kept


def test_it_is_the_divergence_between_the_models_and_the_change_of_the_selection(
    micro_lab, tmp_path, teacher, file, batch
):
    used = make_trainer(micro_lab, tmp_path / "a", file)
    found = error_of(used, "gguf", batch)
    p, q = (logprobs(model, batch) for model in (load_model(teacher), load_model(file)))
    s = logprobs(load_model(micro_lab.student), batch)
    assert found.forward_nats == pytest.approx(divergence(p, q), rel=1e-3)
    assert found.reverse_nats == pytest.approx(divergence(q, p), rel=1e-3)
    assert found.student_nats == pytest.approx(divergence(s, p), rel=1e-3)
    full = make_trainer(micro_lab, tmp_path / "b", teacher)
    ours, theirs = kept(used, batch), kept(full, batch)
    assert (found.kept, found.tokens) == (int(ours.sum()), len(ours))
    assert found.changed == int((ours & ~theirs).sum())
    assert found.forward_nats > 1e-6


@pytest.mark.parametrize("signals", ["exact", "topk_lists"])
def test_the_tokens_that_it_counts_are_those_of_the_first_step(
    micro_lab, tmp_path, teacher, batch, signals
):
    """Also with lists too short to tell what is within reach."""
    trainer = make_trainer(
        micro_lab, tmp_path, teacher, score_top_k=2, signals=signals, method="reach"
    )
    found = both_of(trainer, batch)
    assert torch.equal(kept_tokens(trainer, positions_of(batch), found), kept(trainer, batch))


def test_an_offloaded_teacher_has_none(micro_lab, tmp_path, teacher, batch, monkeypatch):
    trainer = make_trainer(micro_lab, tmp_path, teacher)
    trainer._teacher.offload = moved = LayerOffload(trainer.teacher_model, "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    found = error_of(trainer, "offload", batch)
    assert found.forward_nats == found.reverse_nats == found.changed == 0
    # Two micro-batches: the offloaded teacher copies its layers for each, the one on the device nothing.
    assert moved.copied_bytes == 2 * moved.layer_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**40))
    assert "no room for the whole" in error_of(trainer, "offload", batch)


def test_without_memory_it_says_so(micro_lab, tmp_path, file, batch, monkeypatch):
    trainer = make_trainer(micro_lab, tmp_path, file)
    monkeypatch.setattr(teacher_error, "free_bytes", lambda: 0)
    found = error_of(trainer, "gguf", batch)
    assert "GiB of memory and 0.0 are free" in found
    assert verdict_of(found).level == "warn"


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="the package bitsandbytes is not installed",
)
def test_a_packed_teacher_is_compared_with_its_own_files(micro_lab, tmp_path, teacher, batch):
    trainer = make_trainer(micro_lab, tmp_path, teacher, teacher_quantization="8bit")
    found = error_of(trainer, "8bit", batch)
    p, q = logprobs(load_model(teacher), batch), logprobs(trainer.teacher_model, batch)
    # Outliers are those of a whole batch: other rows, other numbers.
    assert found.forward_nats == pytest.approx(divergence(p, q), rel=0.5)
    assert 0 < found.forward_nats < 0.3 * found.student_nats


def verdict_of(found):
    return check_teacher_error(SimpleNamespace(), SimpleNamespace(teacher_error=found))


@pytest.mark.parametrize(("nats", "level"), [(0.05, "pass"), (0.2, "warn")])
def test_an_error_that_is_a_part_of_the_lesson_is_a_warning(nats, level):
    found = TeacherError(
        kind="4bit",
        forward_nats=nats,
        reverse_nats=nats / 2,
        student_nats=1.0,
        kept=10,
        changed=3,
        tokens=100,
    )
    verdict = verdict_of(found)
    assert verdict.level == level and "3 of 10 kept tokens (30%)" in verdict.measured
    assert verdict.figures["changed_share"] == 0.3


def items_of(capsys, folder, **settings):
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(folder / "run")} | settings))
    cli.main(["check", str(path), "--json"])
    return {one["item"]: one for one in json.loads(capsys.readouterr().out)["items"]}


def test_of_several_teachers_each_is_compared_on_its_own_prompts(
    micro_lab, tmp_path, teacher, file, capsys
):
    """Oracle: the item of a run with that teacher alone, on those prompts."""
    rows = pd.read_parquet(micro_lab.prompts)
    rows = rows[rows.split == "train"].drop(columns="split")
    rows["teacher"] = ["packed" if number % 2 else "whole" for number in range(len(rows))]
    rows.to_parquet(tmp_path / "both.parquet")
    rows[rows.teacher == "packed"].drop(columns="teacher").to_parquet(tmp_path / "one.parquet")
    student = {"model_name_or_path": str(micro_lab.student)}
    entries = {"whole": {"model": str(teacher)}, "packed": {"model": str(file)}}
    several = student | {"dataset_name": str(tmp_path / "both.parquet"), "teachers": entries}
    single = {
        "dataset_name": str(tmp_path / "one.parquet"),
        "teacher_model_name_or_path": str(file),
    }
    found = items_of(capsys, tmp_path / "several", **several)
    alone = items_of(capsys, tmp_path / "single", **student | single)
    assert "teacher error (whole)" not in found
    figures = found["teacher error (packed)"]["figures"]
    assert figures == pytest.approx(alone["teacher error"]["figures"], rel=1e-4)
    assert figures["forward_nats"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"teacher_offload": "cpu"}, "teacher_offload has no effect"),
        pytest.param({"gguf": True}, "alone.gguf is all there is of the teacher", marks=installed),
    ],
)
def test_the_item_is_there_where_something_is_done_to_the_teacher(
    settings, words, micro_lab, tmp_path, teacher, capsys
):
    source = teacher
    if settings.pop("gguf", False):
        source = tmp_path / "alone.gguf"
        write_gguf(load_model(teacher), source)
    source = {"teacher_model_name_or_path": str(source)}
    path = write_config(micro_lab, tmp_path, **SETTINGS | source | settings)
    cli.main(["check", str(path), "--json"])
    items = {one["item"]: one for one in json.loads(capsys.readouterr().out)["items"]}
    assert ("teacher error" in items) == (words is not None)
    if words:
        assert words in items["teacher error"]["advice"]
        assert items["teacher error"]["level"] == "warn"


def test_a_path_that_was_given_in_python_has_the_item_too(micro_lab, tmp_path, file):
    trainer = TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=str(file),
        args=TeachabilityConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
    )
    (found,) = (each for each in trainer.check() if each.item == "teacher error")
    assert found.measured.startswith("gguf: ") and found.figures["forward_nats"] > 0
