"""`taopd diagnose`. Oracles: exit codes, what is on disk afterwards, and the message's wording."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from taopd import cli
from taopd.diagnose.bank import BANK_FORMAT, NUM_COMPLETIONS, FixedContextBank
from taopd.diagnose.bank.manifest import write_manifest, written_whole
from taopd.diagnose.gain_files import read_gains
from taopd.errors import DataError
from tests.conftest import make_model, make_rows, replaced


def fails(capsys, *argv) -> str:
    """Run a command that must fail; return its one line on stderr."""
    assert cli.main([str(argument) for argument in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("taopd d")]
    assert len(lines) == 1, lines
    return lines[0]


def works(*argv) -> None:
    assert cli.main([str(argument) for argument in argv]) == 0


@pytest.fixture(scope="module")
def frozen(micro_lab, tmp_path_factory) -> Path:
    """A folder with a bank and copies of the models it was frozen with."""
    root = tmp_path_factory.mktemp("diagnose")
    for name in ("student", "teacher"):
        shutil.copytree(micro_lab.root / name, root / name)
    works(*freeze_argv(micro_lab, root / "bank", models=root))
    return root


def freeze_argv(micro_lab, output, *more, models=None):
    models = models or micro_lab.root
    return (
        *("diagnose", "freeze", "--student", models / "student", "--teacher", models / "teacher"),
        *("--prompts", micro_lab.prompts, "--num-completions", 6, "--max-tokens", 5),
        *("--k", 2, 4, "--seed", 1, "--output", output, *more),
    )


@pytest.mark.parametrize("name", [None, "freeze", "gain", "one-step"])
def test_help_fits_a_screen_and_holds_an_example(capsys, name):
    assert cli.main(["diagnose", *([name] if name else []), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert "example:" in lines and lines[-1].startswith("  taopd diagnose ")


def test_the_help_page_names_the_bank_s_number_of_completions(capsys):
    assert cli.main(["diagnose", "freeze", "--help"]) == 0
    assert f"(default: {NUM_COMPLETIONS}; of a file: all)" in capsys.readouterr().out


def test_freeze_writes_a_bank_that_a_second_one_equals(frozen, micro_lab, tmp_path, capsys):
    works(*freeze_argv(micro_lab, tmp_path / "again"))
    out = capsys.readouterr().out
    assert "tokens" in out and "mean compatibility, K = 4" in out
    bank = FixedContextBank.open(frozen / "bank")
    assert (bank.k, len(bank.rollouts)) == ([2, 4], 6)
    assert bank.manifest["rollouts"]["seed"] == 1
    for name in ("tokens.parquet", "rollouts.safetensors", "manifest.json"):
        assert (frozen / "bank" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    sources = json.loads((frozen / "bank" / "sources.json").read_text())
    assert sources == {"student": "../student", "teacher": "../teacher"}


def test_freeze_from_a_file_of_completions(micro_lab, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"prompt": "1 + 2 =", "completion": "3 <eos>"}\n' * 3)
    argv = ("--student", micro_lab.student, "--teacher", micro_lab.teacher, "--completions", path)
    works("diagnose", "freeze", *argv, "--output", tmp_path / "bank")
    tokens = FixedContextBank.open(tmp_path / "bank").tokens
    assert tokens["token_id"].tolist() == [7, 2] * 3 and set(tokens["prompt"]) == {0}


def test_gain_of_the_student_is_zero_and_the_curve_keeps_its_order(frozen, tmp_path, capsys):
    make_model(seed=3).save_pretrained(tmp_path / "checkpoint-5")
    argv = ("--after", frozen / "student", tmp_path / "checkpoint-5")
    works("diagnose", "gain", frozen / "bank", *argv)
    out = capsys.readouterr().out
    assert "learnable" in out and "checkpoint-5" in out and "0 of 30" in out
    same, other = read_gains(frozen / "bank-gain")
    assert same.tokens["gain_forward"].abs().max() < 1e-6
    assert other.step == 5 and other.tokens["gain_forward"].abs().max() > 1e-3
    manifest = json.loads((frozen / "bank-gain" / "manifest.json").read_text())
    assert [entry["label"] for entry in manifest["checkpoints"]] == ["student", "checkpoint-5"]
    assert "already holds a gain" in fails(capsys, "diagnose", "gain", frozen / "bank", *argv)
    works("diagnose", "gain", frozen / "bank", *argv, "--overwrite")


def test_a_moved_bank_asks_for_the_teacher_or_takes_it(frozen, tmp_path, capsys):
    bank = shutil.copytree(frozen / "bank", tmp_path / "far" / "away" / "bank")
    argv = ("diagnose", "gain", bank, "--after", frozen / "student", "--output", tmp_path / "g")
    assert "no longer at" in fails(capsys, *argv)
    works(*argv, "--teacher", frozen / "teacher")
    (bank / "sources.json").unlink()
    line = fails(capsys, *argv[:-1], tmp_path / "g2")
    assert "does not say where its teacher is; name it with --teacher" in line
    line = fails(capsys, *argv[:-1], tmp_path / "g2", "--teacher", frozen / "student")
    assert "this teacher is not the one the bank was frozen with" in line
    assert not (tmp_path / "g2").exists()


def test_a_bank_behind_a_link_finds_its_teacher(frozen, micro_lab, tmp_path):
    """Beyond a link to a folder elsewhere ".." is not the folder that the path says."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep")
    for name in ("student", "teacher"):
        shutil.copytree(frozen / name, tmp_path / name)
    bank = tmp_path / "runs" / "bank"
    works(*freeze_argv(micro_lab, bank, models=tmp_path))
    works("diagnose", "gain", bank, "--after", tmp_path / "student")


@pytest.mark.parametrize("flag", ["--prompts", "--completions"])
def test_contexts_are_read_before_a_model_is_loaded(micro_lab, tmp_path, capsys, monkeypatch, flag):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("taopd.models.loading.load_model", load)
    (tmp_path / "x.jsonl").write_text("x\n")
    models = ("--student", micro_lab.student, "--teacher", micro_lab.teacher)
    fails(
        capsys,
        "diagnose",
        "freeze",
        *models,
        flag,
        tmp_path / "x.jsonl",
        "--output",
        tmp_path / "bank",
    )


def test_every_line_of_completions_is_read_or_named(micro_lab, tmp_path, capsys):
    path = tmp_path / "completions.jsonl"
    good = '{"prompt": "1 + 2 =", "completion": "3 <eos>"}\n'
    argv = ("--student", micro_lab.student, "--teacher", micro_lab.teacher, "--completions", path)
    command = ("diagnose", "freeze", *argv, "--output", tmp_path / "bank")
    path.write_text(f"{good}{good}{good[:20]}")
    assert "completions.jsonl, line 3: not JSON" in fails(capsys, *command)
    path.write_text(f"{good}\n{{}}\n")
    assert "completions.jsonl, line 3: expected an object with a prompt" in fails(capsys, *command)
    path.write_text(good.replace("{", '{"prompt": "2 + 2 =", '))
    assert "completions.jsonl, line 1: the key 'prompt' stands twice" in fails(capsys, *command)
    path.write_text(f"{good}\n\u2028\n{good}\n")
    works(*command)
    assert len(FixedContextBank.open(tmp_path / "bank").rollouts) == 2


@pytest.mark.parametrize(("flag", "value"), [("--split", "test"), ("--seed", 5)])
def test_flags_of_sampled_contexts_are_refused_with_completions(tmp_path, capsys, flag, value):
    argv = ("--student", "s", "--teacher", "t", "--completions", tmp_path / "c", flag, value)
    line = fails(capsys, "diagnose", "freeze", *argv, "--output", tmp_path / "bank")
    assert f"{flag} goes with --prompts, and would do nothing with --completions" in line


def test_a_report_goes_beside_its_gains_or_says_why_not(frozen, tmp_path, capsys, monkeypatch):
    argv = ("--after", frozen / "student", "--output", tmp_path / "gains")
    works("diagnose", "gain", frozen / "bank", *argv)
    (tmp_path / "file").write_text("x")
    report = ("diagnose", "report", tmp_path / "gains", "--num-resamples", 2, "--output")
    assert "is a file; the output must" in fails(capsys, *report, tmp_path / "file")
    assert "cannot write to" in fails(capsys, *report, tmp_path / "file" / "report")
    monkeypatch.chdir(tmp_path / "gains")
    works("diagnose", "report", ".", "--num-resamples", 2)
    works("diagnose", "report", ".", "--num-resamples", 2)  # written anew
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    assert "holds files that are no report" in fails(capsys, *report, tmp_path / "mine")
    assert (tmp_path / "mine" / "report.md").read_text() == "mine"
    assert (tmp_path / "gains-report" / "report.md").is_file()


def test_one_step_writes_its_tables(micro_lab, tmp_path, capsys):
    prompts = tmp_path / "prompts.parquet"
    pd.DataFrame(make_rows(40, "train")).to_parquet(prompts)
    argv = (
        *("diagnose", "one-step", "--student", micro_lab.student, "--teacher", micro_lab.teacher),
        *("--prompts", prompts, "--budget", 0.2, "--selectors", "random", "teachability"),
        *("--batches", 2, "--completions", 4, "--max-tokens", 5, "--k", 4),
        *("--learning-rate", 1e-3, "--output", tmp_path / "steps"),
    )
    works(*argv)
    out = capsys.readouterr().out
    assert "teachability" in out and "over random" in out and "Spearman" in out
    steps = pq.read_table(tmp_path / "steps" / "steps.parquet").to_pandas()
    assert len(steps) == 2 * 2 * 2 * 2 and set(steps["variant"]) == {"raw", "equal_norm"}
    first = (tmp_path / "steps" / "summary.parquet").read_bytes()
    works(*argv, "--overwrite")
    assert (tmp_path / "steps" / "summary.parquet").read_bytes() == first
    # A LoRA folder takes the step with its adapter.
    base = AutoModelForCausalLM.from_pretrained(micro_lab.student)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, adapter).save_pretrained(tmp_path / "lora")
    of_lora = ("--output", tmp_path / "lora-steps", "--student", tmp_path / "lora", "--batches", 1)
    works(*replaced(argv, *of_lora))
    steps = pq.read_table(tmp_path / "lora-steps" / "steps.parquet").to_pandas()
    assert len(steps) == 2 * 2 * 2
    capsys.readouterr()
    far = replaced(argv, "--output", tmp_path / "far", "--learning-rate", 1e30)
    works(*far)
    assert "gains are NaN or infinite and are left out of all means" in capsys.readouterr().err
    line = fails(capsys, *replaced(argv, "--output", tmp_path / "more", "--batches", 9))
    assert "9 batches of 4 frozen and as many fresh contexts need 72" in line


def test_bad_input_is_one_line_and_leaves_nothing(frozen, micro_lab, tmp_path, capsys):
    def bad(*argv):
        return fails(capsys, "diagnose", *argv)

    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("x")
    freeze = freeze_argv(micro_lab, out)[1:]
    assert "Did you mean 'freeze'" in bad("freez")
    assert "either --prompts FILE or --completions" in bad(*freeze, "--completions", file)
    assert "is a file; the output must be a folder" in bad(*freeze[:-1], file)
    assert "argument --num-completions: must" in bad(*replaced(freeze, "--num-completions", 0))
    assert "argument --k: must be" in bad(*replaced(freeze, "--k", 0))
    assert "k=99: larger than the vocabulary of 40" in bad(*replaced(freeze, "--k", 99))
    assert "--temperature=nan" in bad(*replaced(freeze, "--temperature", "nan"))
    same = "the teacher is the student and reads the same prompts"
    assert same in bad(*replaced(freeze, "--teacher", "self"))
    assert same in bad(
        *replaced(freeze, "--teacher", "self"), "--teacher-prompt-template", "{prompt}"
    )
    assert "no split 'dev'" in bad(*replaced(freeze, "--split", "dev"))
    assert "no such bank folder" in bad("gain", tmp_path / "none", "--after", micro_lab.student)
    assert "a bank is a folder" in bad("gain", file, "--after", micro_lab.student)
    argv = ("gain", frozen / "bank", "--output", out, "--after")
    assert "is a file; a model is a folder" in bad(*argv, file)
    make_model(seed=0, vocab_size=43).save_pretrained(tmp_path / "larger")
    assert "has another vocabulary: its head has 43 rows" in bad(*argv, tmp_path / "larger")
    assert "Did you mean 'tip'" in bad(
        *("one-step", "--student", micro_lab.student, "--teacher", micro_lab.teacher),
        *("--prompts", micro_lab.prompts, "--selectors", "tipp", "--output", out),
    )
    assert "k=99: must be at most the vocabulary of 40" in bad(
        *("one-step", "--student", micro_lab.student, "--teacher", micro_lab.teacher),
        *("--prompts", micro_lab.prompts, "--batches", 1, "--completions", 1, "--k", 99),
        *("--output", out),
    )
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "larger"]


def test_a_bank_may_be_the_folder_one_is_in_or_lie_behind_a_link(micro_lab, tmp_path, monkeypatch):
    """Both stay what they are, also where a second bank replaces the first."""
    real, here = tmp_path / "disk" / "bank", tmp_path / "here"
    real.mkdir(parents=True)
    here.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(here)
    for output, folder in ((tmp_path / "link", real), (".", here)):
        works(*freeze_argv(micro_lab, output))
        works(*freeze_argv(micro_lab, output, "--overwrite"))
        assert FixedContextBank.open(folder).k == [2, 4]
    assert (tmp_path / "link").is_symlink() and os.getcwd() == str(here)
    works("diagnose", "gain", ".", "--after", micro_lab.student, "--output", tmp_path / "g-gain")
    monkeypatch.chdir(tmp_path / "g-gain")
    works("report", ".", "--output", tmp_path / "x.html")
    assert ">g-gain<" in (tmp_path / "x.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "here", "link", "g-gain", "x.html"}


def test_what_came_into_the_folder_meanwhile_stays(tmp_path):
    with (
        pytest.raises(DataError, match="holds files that are no bank"),
        written_whole(tmp_path / "bank", BANK_FORMAT, overwrite=True) as partial,
    ):
        write_manifest(partial, BANK_FORMAT, {})
        (tmp_path / "bank").mkdir()
        (tmp_path / "bank" / "of_another.txt").write_text("kept")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    assert (tmp_path / "bank" / "of_another.txt").read_text() == "kept"


def test_a_support_size_is_looked_at_before_completions_are_sampled(micro_lab, tmp_path, capsys):
    # Completions that cannot be: their error would come first.
    freeze = freeze_argv(micro_lab, tmp_path / "out")
    argv = replaced(freeze, "--max-tokens", 5000)
    assert "exceeds the context" in fails(capsys, *argv)
    assert "larger than the vocabulary" in fails(capsys, *replaced(argv, "--k", 99))


def test_a_truncated_bank_is_refused_with_the_reason(frozen, tmp_path, capsys):
    bank = shutil.copytree(frozen / "bank", tmp_path / "bank")
    path = bank / "tokens.parquet"
    path.write_bytes(path.read_bytes()[:100])
    line = fails(capsys, "diagnose", "gain", bank, "--after", frozen / "student")
    assert "tokens.parquet was truncated: it has 100 bytes and the manifest says" in line
