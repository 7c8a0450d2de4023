"""Runs that are resumed. Oracle: the same run, never interrupted, to the bit."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_trainer import make_trainer, weights_of

from taopd.diagnose.bank import FixedContextBank, sample_rollouts
from taopd.diagnose.callback import BankCallback
from taopd.errors import ConfigError, DataError
from taopd.models.loading import load_model
from taopd.models.prompts import load_prompts
from taopd.runs.checkpoints import (
    OPTIMIZER,
    SEAL,
    STATE,
    checkpoints,
    newest_complete,
    why_incomplete,
)
from taopd.trainer.checkpoint.resume import finished
from taopd.trainer.checkpoint.same_start import SameStart
from tests.conftest import make_model, make_tokenizer

CLOCKS = ("perf/", "step_time", "train_runtime", "train_samples", "train_steps", "train_loss")
SAVED = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "budget": 0.3}


def lines_of(run, name="metrics.jsonl"):
    """Every line of a log, without clocks and without the summary of the last process."""
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(CLOCKS)}
        for row in rows
        if "train_runtime" not in row
    ]


def assert_same_weights(trainer, expected):
    found = weights_of(trainer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


CASES = {
    "plain": {},
    "later epochs": {"max_steps": 8, "resumed": (2, 3, 4, 6, 7)},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "within a generation batch": {"num_iterations": 3, "max_steps": 7, "resumed": (1, 2, 3, 5)},
    "within a logging window": {"logging_steps": 4, "resumed": (1, 3)},
    "groups, window, anchor": {"num_generations": 4, "gradient_window": 2, "anchor_coef": 1.0},
    "workers that stay": {
        **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        **{"max_steps": 7, "resumed": (2, 3, 4)},
    },
    "a remembered start": {"method": "reach", "anchor_responses": 0.5, "temperature": 0.05},
    "a schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_anywhere_it_ends_the_same(micro_lab, tmp_path, case):
    settings = SAVED | {"max_steps": 5, "log_selection": True} | CASES[case]
    resumed = settings.pop("resumed", (1, 3))
    run = tmp_path / "run"
    whole = make_trainer(micro_lab, tmp_path, **settings)
    prompts = []
    whole.observers.append(lambda scored: prompts.append(scored.batch["prompt_ids"].tolist()))
    whole.train()
    expected, metrics, rollouts = weights_of(whole), lines_of(run), lines_of(run, "rollouts.jsonl")
    assert len(metrics) >= 1 and prompts[0] != prompts[-1]
    for step in resumed:
        (run / "metrics.jsonl").open("a").write('{"step": 99, "loss": 1}\n{"step": 1')
        (run / "selection" / "step-000099.parquet").write_text("stale")
        part = make_trainer(micro_lab, tmp_path, **settings)
        part.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
        assert_same_weights(part, expected)
        assert lines_of(run) == metrics
        assert lines_of(run, "rollouts.jsonl") == rollouts
        assert not (run / "selection" / "step-000099.parquet").exists()


def test_every_epoch_sees_every_prompt_once_when_resumed_in_the_second(micro_lab, tmp_path):
    settings = SAVED | {"max_steps": 6}
    make_trainer(micro_lab, tmp_path, **settings | {"max_steps": 4}).train()
    part = make_trainer(micro_lab, tmp_path, **settings)
    seen = []
    part._prepare_inputs_before = part._prepare_inputs

    def spy(batch):
        seen.extend(row["prompt"] for row in batch)
        return part._prepare_inputs_before(batch)

    part._prepare_inputs = spy
    part.train(resume_from_checkpoint=True)
    whole = make_trainer(micro_lab, tmp_path / "whole", **settings)
    order, sampler = [], whole._get_train_sampler()
    rows = load_prompts(str(micro_lab.prompts), split="train")["prompt"]
    for _ in range(2):
        order += [rows[index] for index in sampler]
    assert seen == order[32:48]


def test_a_checkpoint_holds_everything_and_no_pickle(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    folder = tmp_path / "run" / "checkpoint-2"
    files = {path.name for path in folder.rglob("*")}
    assert {"model.safetensors", OPTIMIZER, "rank-0.safetensors", STATE, SEAL} <= files
    everything = [*tmp_path.rglob("*")]
    assert not [path for path in everything if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert not [path for path in everything if path.name.startswith(".checkpoint")]
    listed = json.loads((folder / SEAL).read_text())["files"]
    assert set(listed) == files - {SEAL}
    assert why_incomplete(folder) is None


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray((folder / OPTIMIZER).read_bytes())
        content[-1] ^= 1
        (folder / OPTIMIZER).write_bytes(content)
    elif how == "missing":
        (folder / "rank-0.safetensors").unlink()
    elif how == "no seal":
        (folder / SEAL).unlink()
    elif how == "torn seal":
        (folder / SEAL).write_text((folder / SEAL).read_text()[:100])
    elif how == "pickle":
        (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    elif how == "link":
        weights.rename(folder.parent / "elsewhere")
        weights.symlink_to(folder.parent / "elsewhere")
    elif how == "renamed":
        folder.rename(folder.with_name("checkpoint-9"))


REASONS = {
    "truncated": "model.safetensors has .* bytes instead of",
    "flipped": "optimizer.safetensors is damaged",
    "missing": "rank-0.safetensors is missing",
    "no seal": "it has no taopd.json",
    "torn seal": "its taopd.json cannot be read",
    "pickle": "it holds optimizer.pt, a pickle",
    "link": "model.safetensors is missing",
    "renamed": "checkpoint-9 is passed over: it is step 3 under another name: rename it checkpoint-3",
}


@pytest.fixture(scope="module")
def three_steps(micro_lab, tmp_path_factory):
    """A run of three steps with a checkpoint of each, and its weights."""
    folder = tmp_path_factory.mktemp("three")
    trainer = make_trainer(micro_lab, folder, **SAVED, max_steps=3)
    trainer.train()
    return folder / "run", weights_of(trainer)


@pytest.mark.parametrize("how", REASONS)
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(three_steps, tmp_path, how, caplog):
    run = tmp_path / "run"
    shutil.copytree(three_steps[0], run)
    damage(run / "checkpoint-3", how)
    found, passed_over = newest_complete(run)
    assert found == run / "checkpoint-2"
    (line,) = passed_over
    assert re.search(REASONS[how], line), line


@pytest.mark.parametrize(("epochs", "steps", "said"), [(2, 6, "2"), (1.5, 5, "1.66667")])
def test_fewer_epochs_than_were_done_are_refused_as_fewer_steps_are(
    micro_lab, tmp_path, epochs, steps, said
):
    settings = SAVED | {"max_steps": -1, "num_train_epochs": epochs, "save_total_limit": 1}
    run, whole = tmp_path / "run", make_trainer(micro_lab, tmp_path, **settings)
    whole.train()
    expected, results = weights_of(whole), (run / "results.json").read_text()
    assert whole.state.global_step == steps
    fewer = make_trainer(micro_lab, tmp_path, **settings | {"num_train_epochs": 1})
    told = f"num_train_epochs=1: the run has done {said} already .*ask for {said} or more"
    with pytest.raises(ConfigError, match=told):
        fewer.train(resume_from_checkpoint=True)
    assert (run / "results.json").read_text() == results
    same = make_trainer(micro_lab, tmp_path, **settings)
    assert finished(same.args, run, newest_complete(run)[0]) == (
        f"has done its {steps} steps; a larger num_train_epochs goes on from there"
    )
    same.train(resume_from_checkpoint=True)
    assert_same_weights(same, expected)


def test_training_goes_on_from_the_one_before_and_heals_the_run(
    three_steps, micro_lab, tmp_path, caplog
):
    run = tmp_path / "run"
    shutil.copytree(three_steps[0], run)
    damage(run / "checkpoint-3", "flipped")
    part = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=3)
    with pytest.raises(DataError, match=r"checkpoint-3: optimizer.safetensors is damaged"):
        part.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    part.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over: optimizer.safetensors is damaged" in caplog.text
    assert_same_weights(part, three_steps[1])
    assert why_incomplete(run / "checkpoint-3") is None
    with pytest.raises(ConfigError, match="max_steps=2: the run has done 3 already"):
        make_trainer(micro_lab, tmp_path, **SAVED, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="resume_from_checkpoint=3: must be True"):
        part.train(resume_from_checkpoint=3)
    for step in (1, 2, 3):
        damage(run / f"checkpoint-{step}", "no seal")
    with pytest.raises(DataError, match="nothing to resume from: checkpoint-3 is passed over"):
        make_trainer(micro_lab, tmp_path, **SAVED, max_steps=3).train(resume_from_checkpoint=True)


def test_the_limit_deletes_after_the_new_one_is_whole(micro_lab, tmp_path, monkeypatch):
    """Oracle: at the moment of every deletion another checkpoint is whole."""
    from taopd.trainer.checkpoint import mixin as whole_checkpoints

    rotate, whole = whole_checkpoints.rotate_checkpoints, []

    def watched(run, *args, **kwargs):
        whole.append([why_incomplete(path) for path in checkpoints(tmp_path / "run")])
        rotate(run, *args, **kwargs)

    monkeypatch.setattr(whole_checkpoints, "rotate_checkpoints", watched)
    make_trainer(micro_lab, tmp_path, **SAVED, max_steps=3, save_total_limit=1).train()
    assert whole == [[None], [None, None], [None, None]]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_the_best_checkpoint_keeps_its_final_name(micro_lab, tmp_path):
    trainer = make_trainer(
        micro_lab,
        tmp_path,
        **SAVED,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        per_device_eval_batch_size=8,
        warmup_steps=0,
        eval_dataset=load_prompts(str(micro_lab.prompts), split="test"),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in {str(path) for path in checkpoints(tmp_path / "run")}
    saved = json.loads((tmp_path / "run/checkpoint-2" / STATE).read_text())
    assert saved["best_model_checkpoint"] == best
    stored = load_file(f"{best}/model.safetensors")
    assert all(torch.equal(value, weights_of(trainer)[name]) for name, value in stored.items())


def test_another_division_of_a_batch_in_use_is_refused(micro_lab, tmp_path):
    settings = SAVED | {"num_iterations": 2, "max_steps": 3}
    make_trainer(micro_lab, tmp_path, **settings).train()
    other = make_trainer(micro_lab, tmp_path, **settings | {"num_iterations": 3})
    with pytest.raises(ConfigError, match="in the middle of a generation batch"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_callbacks_go_on_where_they_were(micro_lab, tmp_path):
    """Bank curve and collapse guard; oracle: their state after the run that was never interrupted."""
    bank_student = load_model(micro_lab.student, dtype="float32")
    bank = FixedContextBank.freeze(
        bank_student,
        load_model(micro_lab.teacher, dtype="float32"),
        make_tokenizer(),
        sample_rollouts(
            bank_student, make_tokenizer(), ["3 + 4 ="], num_completions=4, max_tokens=6
        ),
        tmp_path / "bank",
        k=(2, 4),
    )
    settings = SAVED | {"max_steps": 4, "guard_every": 1}

    def run(checkpoint=None):
        trainer = make_trainer(micro_lab, tmp_path, **settings)
        callback = BankCallback.attach(trainer, bank, every=1)
        trainer.train(resume_from_checkpoint=checkpoint)
        states = trainer.rank_state._take()["callbacks"]
        assert {"CollapseGuard-0", "BankCallback-0", "SamplerMonitor-0"} <= set(states)
        return callback.curve, states

    curve, states = run()
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]
    again, resumed = run(str(tmp_path / "run" / "checkpoint-2"))
    assert json.dumps(again) == json.dumps(curve)  # nan is nan
    assert json.dumps(resumed) == json.dumps(states)


def swapped(micro_lab, folder, name):
    """A copy of the lab whose student is another model, or the same one in 16 bits."""
    lab = SimpleNamespace(**vars(micro_lab) | {"student": folder / "student"})
    shutil.copytree(micro_lab.student, lab.student)
    model = load_model(micro_lab.student, dtype="float32")
    if name == "half precision":
        model.to(torch.bfloat16).save_pretrained(lab.student)
    if name == "trained":
        shutil.copy(folder / "run/checkpoint-2/model.safetensors", lab.student)
    return lab


@pytest.mark.parametrize("method", ["reach", "anchored", "published"])
@pytest.mark.parametrize("name", ["unchanged", "half precision", "trained"])
def test_a_resumed_run_compares_with_the_student_that_it_began_with(
    micro_lab, tmp_path, method, name
):
    """A folder that was written over, or a checkpoint as the model, is another start."""
    settings = SAVED | {"method": method, "save_steps": 2, "max_steps": 3, "learning_rate": 5e-2}
    settings |= {"collapse_guard": "off"}
    make_trainer(micro_lab, tmp_path, **settings).train()
    trainer = make_trainer(swapped(micro_lab, tmp_path, name), tmp_path, **settings)
    checkpoint = str(tmp_path / "run/checkpoint-2")
    if name == "trained" and method != "published":
        with pytest.raises(ConfigError, match=r"not the one that this run began with.*model_name"):
            trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 3


def test_a_new_adapter_is_the_same_start_and_a_trained_one_is_not():
    """Of a LoRA half of the weights are drawn anew, and change nothing while the others are zero."""

    def start(seed, trained=False):
        torch.manual_seed(seed)
        model = get_peft_model(make_model(seed=0), LoraConfig(r=2, target_modules=["q_proj"]))
        for weight_name, weight in model.named_parameters():
            if trained and "lora_B" in weight_name:
                weight.data += 1e-3
        return SameStart(model, Accelerator(cpu=True), needed=True)

    kept = start(0).checkpoint_state()
    start(1).load_checkpoint_state(kept)
    with pytest.raises(ConfigError):
        start(1, trained=True).load_checkpoint_state(kept)
    trained = start(1, trained=True)
    trained.load_checkpoint_state(trained.checkpoint_state())
