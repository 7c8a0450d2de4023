"""Input that only fails inside a library: one message that names it, exit code 2, no traceback."""

import os
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd import cli
from taopd.errors import ConfigError, DataError
from taopd.models import loading
from taopd.runs.validation import read_yaml
from taopd.selectors import select
from tests.conftest import WORDS, make_model, make_tokenizer, write_config
from tests.e2e.test_trainer import CPU, OURS
from tests.unit.selector_tables import random_table


@pytest.fixture
def train(micro_lab, tmp_path, capsys):
    """Runs `taopd train` with settings over a working config; returns exit code and stderr."""

    def run(*flags, **settings):
        base = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 1}
        path = write_config(micro_lab, tmp_path, **base | settings)
        code = cli.main(["train", "--config", str(path), "--quiet", *flags])
        return code, capsys.readouterr().err

    return run


MISSING = [
    ({"report_to": "wandb"}, "wandb"),
    (
        {"report_to": "wandbb"},
        "report_to=['wandbb']: wandbb is not supported; take some of azure_ml,",
    ),
    ({"report_to": ["none", "wandb"]}, "report_to=['none', 'wandb']: none is not supported; take"),
    ({"use_vllm": True}, "vLLM"),
    ({"deepspeed": "/nowhere/zero3.json"}, "deepspeed='/nowhere/zero3.json': no such file"),
    ({"fsdp": "full_shard", "fsdp_config": "/nowhere/x.json"}, "fsdp_config='/nowhere/x.json'"),
    ({"use_liger_kernel": True}, "liger-kernel"),
    ({"optim": "adamw_8bit"}, "bitsandbytes"),
    ({"output_dir": "/proc/nowhere/run"}, "/proc/nowhere"),
    ({"output_dir": "/sys/run"}, "/sys/run"),
]


@pytest.mark.parametrize(("settings", "named"), MISSING)
def test_a_missing_package_file_or_folder_is_named(train, settings, named):
    code, told = train("--skip-check", **settings)
    assert code == 2 and told.startswith("taopd train: error:") and named in told
    assert len(told.splitlines()) == 1


def test_without_settings_the_missing_ones_are_named(capsys):
    assert cli.main(["train"]) == 2
    told = capsys.readouterr().err
    assert "missing: model_name_or_path, teacher_model_name_or_path, dataset_name" in told


def test_a_student_of_nan_is_said_so(train, micro_lab, tmp_path):
    model = make_model(seed=0)
    model.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    for flags in (["--skip-check"], ["--overwrite"]):
        code, told = train(*flags, model_name_or_path=str(tmp_path / "nan"))
        assert code == 2 and "student's logits are NaN or infinite" in told


def test_a_pad_id_beyond_the_teachers_vocabulary_changes_nothing(train, tmp_path):
    """The same weights with a pad token of their own at the end of the vocabulary."""
    words, losses = (*WORDS, "<padding>"), []
    for name, pad in (("plain", "<pad>"), ("padded", "<padding>")):
        model = make_model(seed=0, vocab_size=len(words))
        model.generation_config.pad_token_id = words.index(pad)
        model.save_pretrained(tmp_path / name)
        tokenizer = make_tokenizer(words)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(tmp_path / name)
        settings = {"model_name_or_path": str(tmp_path / name), "learning_rate": 1e-2}
        code, told = train("--overwrite", **settings)
        assert code == 0, told
        losses.append(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict())
    for name, value in losses[0].items():
        assert torch.equal(value[:40], losses[1][name][:40]), name


def test_a_prompt_that_the_teacher_cannot_read_is_refused(train, tmp_path):
    words = (*WORDS, "<new>")
    make_model(seed=0, vocab_size=len(words)).save_pretrained(tmp_path / "more")
    make_tokenizer(words).save_pretrained(tmp_path / "more")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "<new> 3 + 4 ="}\n' * 8)
    more = {
        "model_name_or_path": str(tmp_path / "more"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
    }
    for flags in (["--skip-check"], ["--overwrite"]):
        code, told = train(*flags, **more)
        assert code == 2 and f"the token id {len(words) - 1}" in told and "up to 39" in told


def raising(view):
    return view.no_such_signal


def keyed(view):
    raise KeyError("x")


@pytest.mark.parametrize("name", ["raising", "keyed"])
def test_a_selector_that_raises_is_named_with_its_line(train, name):
    with pytest.raises(
        ConfigError, match=rf"{name}.*(AttributeError|KeyError).*test_dead_ends.py, line"
    ):
        select(random_table(), selector=globals()[name], budget=0.5)
    code, told = train("--skip-check", selector=f"tests.unit.test_dead_ends:{name}")
    assert code == 2 and "test_dead_ends.py, line" in told


def test_a_name_that_only_the_hub_could_know_fails_at_once_without_a_hub(monkeypatch):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)  # Whoever tries again waits first.
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(
            DataError, match=r"no such folder here .*127\.0\.0\.1 cannot be reached"
        ):
            load("nobody/nothing")
    assert slept == []


@pytest.mark.parametrize("place", ["/proc/taopd/run", "file/run"])
def test_an_impossible_output_is_refused_before_the_models_are_made(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert cli.main(["demo", "--real", "--output", place]) == 2
    assert f"cannot write to '{place}'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budget: 0.1\nseed: 1\nbudget: 0.2\n", "'budget' stands twice, in lines 1 and 3"),
        ("model_init_kwargs:\n  a: 1\n  a: 2\n", "'a' stands twice, in lines 2 and 3"),
        ("model_init_kwargs: {a: 1, a: 2}\n", "'a' stands twice, in line 1"),
        ("output_dir: ${SCRATCH}/run\n", r"holds \$\{SCRATCH\}"),
        ("output_dir: $SCRATCH/run\n", r"holds \$SCRATCH:"),
    ],
)
def test_a_file_that_says_a_thing_twice_or_names_a_variable_is_refused(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_yaml(path, "the config file")


def test_merged_mappings_and_dollars_that_are_no_variables_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: [*a, *b]\n  x: 3\nd: 'regex:[0-9]+$'\ne: 5 $ a\n"
    )
    assert read_yaml(path, "it") == {
        "a": {"x": 1},
        "b": {"x": 2},
        "c": {"x": 3},
        "d": "regex:[0-9]+$",
        "e": "5 $ a",
    }


def test_a_pattern_that_tries_every_division_of_the_text_is_given_up(monkeypatch):
    from taopd.experiments.evaluation import grading

    monkeypatch.setattr(grading, "_TIMEOUT_SECONDS", 0.2)
    grade = grading.Grader(r"regex:^(\d+)+$")
    assert grade("12", "12").correct
    with pytest.raises(ConfigError, match="repeats within repeats"):
        grading.Grader(r"regex:^(a|aa)+$")("a" * 60 + "b", "a")


def test_help_of_every_setting_holds_no_python(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "option_strings" not in text and "%%" not in text and "%(" not in text
