"""A run started in Python leaves what a command leaves. Oracles: the files, as a reader finds them."""

import json
import logging
import math
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import taopd
from taopd import TeachabilityConfig, TeachabilityTrainer, load_prompts
from taopd.errors import ConfigError, DataError
from taopd.preflight.verdict import BROKEN
from taopd.report.folders import read_folders
from taopd.report.page import write_report
from taopd.runs.folder import RunFolder
from taopd.teachers import LocalTeacher
from tests.e2e.test_trainer import CPU, OURS, make_trainer

KEYS = {"command", "steps", "train_seconds", "selector", "budget", "loss", "seed", "model", "train"}


@pytest.fixture(scope="module")
def trained(micro_lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    trainer = make_trainer(micro_lab, folder, max_steps=2, budget=0.2, logging_steps=1)
    log = logging.getLogger("taopd.trainer.run_record")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(log, "warning", lambda text, *values: said.append(text % values))
        trainer.train(check=True)
    return trainer, folder / "run", said


def read(path):
    return json.loads(path.read_text())


def test_the_folder_has_what_a_command_leaves(trained):
    trainer, run, _ = trained
    config, results = read(run / "config.json"), read(run / "results.json")
    assert config["command"] == "train" and config["budget"] == 0.2
    assert config["changed"]["budget"] == 0.2 and "adam_beta1" not in config["changed"]
    assert set(results) >= KEYS and results["steps"] == 2 and results["model"] is None
    assert results["last_log"]["step"] == 2 and results["train"]["train_loss"] is not None
    assert read(run / "env.json")["versions"]["taopd"]
    card = (run / "README.md").read_text()
    assert "generated_from_trainer" in card
    words = f"trained 20 % of the tokens: `method: {trainer.args.method}`, `selector: teachability`"
    assert words in card
    # TRL's has its own paper, and tells the reader to load a model "None".
    assert "None" not in card and "2306.13649" not in card
    citation = yaml.safe_load(
        (Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    )["preferred-citation"]
    assert f"[{citation['title']}](https://huggingface.co/papers/2605.26844)" in card
    authors = (f"{each['given-names']} {each['family-names']}" for each in citation["authors"])
    assert (
        f"author  = {{{' and '.join(authors)}}}" in card and f"{{{{{citation['title']}}}}}" in card
    )
    assert RunFolder.check(run, resume=True) == run  # ours: a command goes on with it


def test_the_card_of_plain_distillation_names_and_cites_trls_method(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1, selector="full")
    trainer.train(check=False)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Teachability" not in card and "2605.26844" not in card
    assert "https://huggingface.co/papers/2306.13649" in card and "trained every token" in card


def test_a_checkpoint_is_as_readable_as_any_file(micro_lab, tmp_path):
    """safetensors writes its files for the owner alone."""
    make_trainer(micro_lab, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    run = tmp_path / "run"
    mask = os.umask(0)
    os.umask(mask)
    written = [path for path in run.glob("checkpoint-*/*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~mask}


def test_the_report_reads_it(trained, tmp_path):
    _, run, _ = trained
    report = write_report([run], tmp_path / "x.html")
    assert {"Token by token", "Over the training"} <= set(report.sections)
    (found,) = read_folders([run]).runs
    assert found.changed["budget"] == 0.2 and found.check and found.results["steps"] == 2


def test_a_model_in_the_run_folder_leaves_the_settings_readable(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    assert "hidden_size" in read(run / "config.json")
    (found,) = read_folders([run]).runs
    assert found.config["max_steps"] == 1 and "hidden_size" not in found.config


class Hub:
    """Takes note of what lies in a folder when the upload reads it: after the checkpoint is written."""

    def __init__(self):
        self.asked: list[Path] = []
        self.taken: set[Path] = set()

    def upload_folder(self, *, folder_path, ignore_patterns=(), **_):
        self.asked.append(Path(folder_path))
        names = {path for path in Path(folder_path).iterdir() if path.is_file()}
        ignored = {path for each in ignore_patterns for path in Path(folder_path).glob(each)}
        self.taken |= names - ignored
        return SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)


def test_checkpoints_are_uploaded_from_where_they_stay(micro_lab, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: hub)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *_, **__: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    pushed = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    pushed["hub_token"] = "hf_secret"
    saved = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(micro_lab, tmp_path, max_steps=2, **pushed, **saved)
    trainer.push_in_progress = None
    trainer.train()
    run = tmp_path / "run"
    assert hub.asked == [run, run / "checkpoint-1", run, run / "checkpoint-2"]
    # Not the settings as transformers pickles them, with the token; nor are they left behind.
    assert run / "model.safetensors" in hub.taken
    assert not [path for path in hub.taken if path.suffix == ".bin"]
    assert not [
        path for path in run.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()
    ]
    (found,) = read_folders([run]).runs
    assert found.config["max_steps"] == 2 and "hidden_size" not in found.config


def test_a_readme_of_the_users_own_stays(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    readme = tmp_path / "run" / "README.md"
    readme.parent.mkdir(exist_ok=True)
    readme.write_text("My notes.")
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert readme.read_text() == "My notes."


def test_the_look_is_the_commands(trained, micro_lab, tmp_path):
    """Once at the start, its warnings said; `check` gives the same items without a run."""
    _, run, said = trained
    items = read(run / "check.json")["items"]
    names = [item["item"] for item in items]
    assert names[0] == "tokenizers" and names[-1] == "kept tokens" and len(names) == 17
    warned = [item["item"] for item in items if item["level"] != "pass"]
    assert [line.split(": ")[2] for line in said] == warned
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    found = trainer.check()
    assert [verdict.item for verdict in found] == names
    assert str(found).splitlines()[0].startswith("pass: tokenizers: 40 token ids in common")
    assert [verdict.item for verdict in taopd.check(trainer)] == names
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_look_moves_nothing(trained, micro_lab, tmp_path):
    _, run, _ = trained
    make_trainer(micro_lab, tmp_path, max_steps=2, budget=0.2, logging_steps=1).train()
    losses = [
        [json.loads(line).get("loss") for line in (at / "metrics.jsonl").read_text().splitlines()]
        for at in (run, tmp_path / "run")
    ]
    assert losses[0] == losses[1] and losses[0][0] is not None


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_the_look_has_the_student_on_the_runs_device(micro_lab, tmp_path, monkeypatch, setting):
    """transformers leaves it on the CPU until training begins; the prompts are on the device."""
    trainer, asked = make_trainer(micro_lab, tmp_path, max_steps=1, **{setting: True}), []
    monkeypatch.setattr(trainer.model, "to", asked.append)
    trainer.check()
    assert asked == [trainer.accelerator.device]


@pytest.mark.parametrize("kind", ["a model", "a teacher of the caller's own"])
def test_a_teacher_without_files_is_looked_at_as_far_as_it_goes(micro_lab, tmp_path, kind):
    """No item breaks; of the tokenizers nothing is said where nobody knows the teacher's."""
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()
    model.config._name_or_path = model.name_or_path = ""
    trainer = TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=model if kind == "a model" else LocalTeacher(model, 40),
        args=TeachabilityConfig(
            output_dir=str(tmp_path / "run"),
            **CPU | OURS,
            per_device_train_batch_size=8,
            max_steps=1,
            loss="sampled_reverse_kl",
        ),
        # No `datasets.Dataset`: a list of rows, as torch takes it.
        train_dataset=list(load_prompts(str(micro_lab.prompts), split="train")),
    )
    found = {verdict.item: verdict for verdict in trainer.check()}
    assert not any(verdict.measured == BROKEN for verdict in found.values()), found
    assert found["tokenizers"].level == "warn" and found["tokenizers"].measured == "not compared"
    assert found["kept tokens"].measured.endswith("at a budget of 10 %")
    # Random models: on what the student samples, a teacher may do worse than guessing among 40 ids. Of a
    # teacher that sends log-probs alone this is known, and is said.
    kl = found["teacher KL"]
    worse = kl.figures.get("teacher_nll_nats", 0.0) > math.log(40)
    assert kl.level == ("warn" if worse else "pass"), kl


def test_a_look_that_fails_stops_the_run_before_its_first_step(micro_lab, tmp_path):
    """Oracle: a context of 64 tokens, and completions of 64."""
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    trainer.model.config.max_position_embeddings = 8
    with pytest.raises(ConfigError, match=r"check before training failed \(context\)"):
        trainer.train(check=True)
    assert not (tmp_path / "run/config.json").exists() and trainer.state.global_step == 0


def test_a_step_is_one_line(micro_lab, tmp_path, capsys):
    make_trainer(micro_lab, tmp_path, max_steps=2, logging_steps=1).train()
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]


def test_a_models_own_folder_is_no_run_folder(micro_lab, tmp_path):
    """Oracle: the model still loads; its `config.json` would become the run's."""
    shutil.copytree(micro_lab.student, tmp_path / "run")
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    with pytest.raises(
        DataError, match=r"holds config\.json that no taopd run wrote .*another output_dir"
    ):
        trainer.train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.hidden_size


def test_a_checkpoint_that_is_not_there_is_no_damaged_one(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    with pytest.raises(DataError, match=r"nothing to resume from: no such folder: .*nowhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_run_that_begins_anew_has_no_results_of_the_one_before(micro_lab, tmp_path):
    make_trainer(micro_lab, tmp_path, max_steps=1).train()
    trainer, run = make_trainer(micro_lab, tmp_path, max_steps=1), tmp_path / "run"
    (run / "check.json").write_text("{}")

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.found = {path.name for path in run.iterdir()}

    trainer.add_callback(looks := Looks())
    trainer.train()
    assert "metrics.jsonl" in looks.found and not looks.found & {"results.json", "check.json"}


def test_checkpoints_of_an_earlier_run_in_the_folder_are_no_newest_ones(
    micro_lab, tmp_path, caplog
):
    """A run that begins anew there, and is resumed, must not go on with another run's student."""
    saved = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(micro_lab, tmp_path, max_steps=6, **saved).train()
    make_trainer(micro_lab, tmp_path, max_steps=2, selector="entropy", **saved).train()
    assert "checkpoints of an earlier run, the newest checkpoint-6" in caplog.text
    assert read(tmp_path / "run" / "results.json")["steps"] == 2
    third = make_trainer(micro_lab, tmp_path, max_steps=3, selector="entropy")
    third.train(resume_from_checkpoint=True)
    assert read(tmp_path / "run" / "results.json")["resumed_from"] == "checkpoint-2"
    fourth = make_trainer(micro_lab, tmp_path, max_steps=7)
    fourth.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert fourth.state.global_step == 7
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(
        DataError, match="nothing to resume from: checkpoint-6 is passed over: it is of"
    ):
        third.train(resume_from_checkpoint=True)


def test_a_runs_folder_in_place_of_a_checkpoints_is_told_what_to_name(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    with pytest.raises(
        DataError, match=r"run: it is a run's folder: name a .* such as checkpoint-2"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run"))


def test_a_run_that_goes_on_with_other_settings_says_so(micro_lab, tmp_path, caplog):
    """As `taopd train --resume-with-changes` does: a warning, and each change with its step."""
    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(micro_lab, tmp_path, **saved, budget=0.5)
    first.train()
    second = make_trainer(micro_lab, tmp_path, max_steps=3, budget=0.2)
    second.train(resume_from_checkpoint=True)
    config = read(tmp_path / "run" / "config.json")
    assert config["budget"] == 0.2
    (change,) = config["changes"]
    assert change["step"] == 2 and change["settings"]["budget"] == {"before": 0.5, "after": 0.2}
    assert "settings change at step 2: " in caplog.text and "budget 0.5 -> 0.2" in caplog.text
    assert read(tmp_path / "run" / "results.json")["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)], ids=["None", "int", "Linear"])
def test_what_is_no_model_is_named(micro_lab, tmp_path, model):
    args = TeachabilityConfig(output_dir=str(tmp_path / "run"), **(CPU | OURS))
    kind = type(model).__name__
    rows = load_prompts(micro_lab.prompts)
    with pytest.raises(ConfigError, match=f"model is a {kind}: pass a folder, a hub id or"):
        TeachabilityTrainer(model, micro_lab.teacher, args, train_dataset=rows)
    told = "no teacher: pass" if model is None else f"the teacher is a {kind}: pass a folder"
    with pytest.raises(ConfigError, match=told):
        TeachabilityTrainer(micro_lab.student, model, args, train_dataset=rows)


def test_paths_are_taken_for_names(micro_lab, tmp_path):
    args = TeachabilityConfig(output_dir=tmp_path / "run", **(CPU | OURS))
    rows = load_prompts(micro_lab.prompts)
    trainer = TeachabilityTrainer(micro_lab.student, micro_lab.teacher, args, train_dataset=rows)
    assert trainer.model.config._name_or_path == str(micro_lab.student)
    assert not isinstance(micro_lab.student, str)
    rows = [{"prompt": "3 + 4 =", "teacher": "one"}] * 8
    several = {"one": micro_lab.teacher, "other": micro_lab.teacher}
    trainer = TeachabilityTrainer(micro_lab.student, several, args, train_dataset=rows)
    assert trainer.teacher_source("one").plain.config._name_or_path == str(micro_lab.teacher)


def test_what_train_does_not_read_and_what_leaves_the_machine_are_said(
    micro_lab, tmp_path, monkeypatch
):
    said: list[str] = []
    log = logging.getLogger("taopd.trainer.run_record")
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1, resume_from_checkpoint="x")
    # What an upload would send is said before it is sent.
    trainer.args.push_to_hub = True
    monkeypatch.setattr(type(trainer), "_push_from_checkpoint", lambda *_: None)
    monkeypatch.setattr(type(trainer), "push_to_hub", lambda *_, **__: None)
    trainer.train(check=False)
    told = " ".join(said)
    assert "resume_from_checkpoint='x'" in told and "begins anew" in told
    assert "completions in rollouts.jsonl" in told
