"""The quick reading of a config for `taopd plan`. Oracles: the parser of `taopd train`, and transformers."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taopd import cli
from taopd.cli import plan as plan_command
from taopd.errors import ConfigError, TaopdError
from taopd.experiments.lab import build
from taopd.experiments.lab.spec import LabSpec
from taopd.trainer.cost import ModelShape, known_shapes, load_shape
from taopd.trainer.cost.plain_config import DEFAULTS, default_settings, plain_config
from taopd.trainer.cost.settings import plan_settings
from taopd.trainer.settings_file import make_parser, parse_settings

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = {
    "model_name_or_path": "s",
    "teacher_model_name_or_path": "t",
    "dataset_name": "d",
    "output_dir": "o",
    "use_cpu": True,
}
VALUES = {
    "per_device_train_batch_size": [1, 6, 0, "2", 2.0, None, True],
    "gradient_accumulation_steps": [1, 4, -1, "x"],
    "max_completion_length": [1, 700, 0, None],
    "score_top_k": [4, 0, 2.5],
    "num_generations": [1, 2, 3, 5, 0],
    "gradient_window": [0, 4, -1, None],
    "use_peft": [True, False, "true"],
    "lora_r": [1, 8, 0],
    "budget": [0.1, 1.0, 0.0, 1, "5%", 7.5],
    "selector": ["full", "random", "entropy", "teachability", "fulll", "teachability*entropy", 3],
    "loss": ["reverse_kl", "forward_kl", "sampled_reverse_kl", "jsd", "kl"],
    "method": ["anchored", "published", "reach", "anchord"],
    "dtype": ["float32", "bfloat16", "auto", "int3"],
    "bf16": [True, False, None],
    "fp16": [True, False],
    "gradient_checkpointing": [True, False],
    "log_update_norm": [True, False],
    "teacher_model_init_kwargs": [{"dtype": "bfloat16"}, {"dtype": "x"}, {"a": 1}, "bfloat16"],
    "model_init_kwargs": [{"dtype": "float16"}, None],
    "optim": ["sgd", "adafactor"],
    "anchor_coef": [0.0, 2.0],
    "anchor_fraction": [0.3, 0.0, 1, 7.5],
    "learning_rate": [1e-5, "1e-5", -1.0, 0.0],
    "seed": [0, 2**32 - 1, 2**32],
    "max_steps": [5, -1, 0],
    "temperature": [1.0, 0.0],
    "adam_beta2": [0.98, 1.5],
    "lr_scheduler_type": ["constant", "konstant"],
    "report_to": ["none", "wandb"],
    "logging_steps": [1, 0, 0.5],
    "save_steps": [20, 0],
    "warmup_steps": [0, 3, -1],
    "weight_decay": [0.1, 0],
    "budgett": [0.1],
    "teacher_url": ["http://127.0.0.1:1"],
    "collapse_guard": ["off", "warn"],
    "dataset_train_split": ["train", "test"],
    "lab": ["dialect", "dialect+fallible", "", "dialekt", 3],
    "teachers": [{"a": {"model": "t"}}, {}, {"a": {"url": "http://127.0.0.1:1"}}, ["a"], "a"],
    "teacher_weights": [{"a": 0.5}, {"b": 0.5}, {"a": 0}, "a"],
    "teacher_column": ["teacher", "", 3],
    "budget_scope": ["global", "teacher", "completion", "all"],
}
SEVERAL = {
    "model_name_or_path": "s",
    "teachers": {"a": {"model": "t"}, "b": {"model": "u"}},
    "dataset_name": "d",
    "output_dir": "o",
    "use_cpu": True,
}


def lab_settings(variant):
    """A lab's, as the commands find them."""
    if variant == "dialect":
        return {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "d"}
    if variant == "dialect+fallible":
        teachers = {"dialect": {"model": "t"}, "fallible": {"model": "u"}}
        return {"model_name_or_path": "s", "teachers": teachers, "dataset_name": "d"}
    raise ConfigError(f"no lab is called {variant!r}")


def test_the_defaults_are_those_of_the_dataclasses():
    # fp16 and bf16 as they are before TRL fills them in.
    fields = {
        each.name: each.default
        for kind in make_parser().dataclass_types
        for each in dataclasses.fields(kind)
    }
    made = {name: fields[name] for name in DEFAULTS if name != "loss"}
    assert made == {name: value for name, value in DEFAULTS.items() if name != "loss"}
    from taopd.trainer.settings.config_checks import loss_of_beta

    assert DEFAULTS["loss"] == loss_of_beta(None)


def compare(document: dict, folder: Path, flags: Sequence[str] = ()) -> bool:
    """Hold the quick reading to the parser's; whether it was one."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        quick = plain_config(str(path), flags, lab=lab_settings)
    except ConfigError as error:
        with pytest.raises(ConfigError) as slow:
            parse_settings(str(path), flags, lab=lab_settings)
        assert str(slow.value) == str(error)
        return False
    if quick is None:
        return False
    # A flag is given once.
    at, rest = (flags.index("--use_cpu"), flags) if "--use_cpu" in flags else (0, [])
    others = [*rest[:at], *rest[at + 2 :]] if rest else flags
    parsed = parse_settings(str(path), [*others, "--use_cpu", "true"], lab=lab_settings)
    device = quick.settings.device
    each = parsed.of_each_teacher().values()
    for one in each:
        assert dataclasses.replace(plan_settings(one), device=device) == quick.settings
    assert device == ("cpu" if document.get("use_cpu") or document.get("bf16") is False else "gpu")
    assert parsed.model.model_name_or_path == quick.student
    assert tuple(one.training.teacher_model_name_or_path for one in each) == quick.teachers
    assert (quick.dataset, quick.split) == (
        parsed.script.dataset_name,
        parsed.script.dataset_train_split,
    )
    return True


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_a_drawn_config_is_read_as_the_parser_reads_it_or_not_at_all(data, tmp_path):
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=5, unique=True))
    # The first values are right ones: wrong ones alone would test nothing but the refusal.
    document = BASE | {
        name: data.draw(st.one_of(st.just(VALUES[name][0]), st.sampled_from(VALUES[name])))
        for name in names
    }
    compare(document, tmp_path)
    # With several teachers, and with a lab in place of the models.
    several = {n: v for n, v in document.items() if n != "teacher_model_name_or_path"}
    compare(SEVERAL | several, tmp_path)
    compare({n: v for n, v in several.items() if n not in SEVERAL} | OF_LAB, tmp_path)


@pytest.mark.parametrize(
    "more", [{}, {"budget": 1.0}, {"anchor_fraction": 0.3}, {"budget": 0.02}], ids=str
)
def test_the_defaults_of_a_plan_are_those_of_a_run(more, tmp_path):
    """Oracle: the parser of `taopd train`, over the models alone."""
    models = {name: value for name, value in BASE.items() if name.startswith(("model", "teacher"))}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE | more))
    parsed = parse_settings(str(path), [])
    assert default_settings(models | more) == plan_settings(parsed)


OF_LAB = {"lab": "dialect", "output_dir": "o", "use_cpu": True}


@pytest.mark.parametrize(
    ("document", "more"),
    [
        (OF_LAB, {}),
        (OF_LAB, {"lab": "dialect+fallible"}),
        (OF_LAB, {"lab": "dialect+fallible", "budget_scope": "teacher", "budget": 0.1}),
        (SEVERAL, {}),
        (SEVERAL, {"teacher_weights": {"b": 0.5}, "teacher_column": "of", "method": "published"}),
    ],
)
def test_labs_and_several_teachers_are_plain(document, more, tmp_path):
    assert compare(document | more, tmp_path)


@pytest.mark.parametrize(
    ("document", "more"),
    [
        (OF_LAB, {"dataset_name": "d"}),
        (OF_LAB, {"teacher_model_name_or_path": "self"}),
        (OF_LAB, {"lab": "dialect+dialekt"}),
        (OF_LAB, {"budget_scope": "teacher"}),
        (SEVERAL, {"teacher_model_name_or_path": "t"}),
        (SEVERAL, {"teachers": {"a b": {"model": "t"}}}),
        (SEVERAL, {"teachers": {"a": {"model": "self"}}}),
        (SEVERAL, {"teachers": {"a": {"model": "t", "quantization": "4bit"}}}),
        (SEVERAL, {"teacher_weights": {"c": 0.5}}),
    ],
)
def test_others_of_theirs_are_left_to_the_parser(document, more, tmp_path):
    assert not compare(document | more, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
def test_every_value_alone(name, value, tmp_path):
    """A value that the parser refuses is not read: an assertion of `compare` would raise its error."""
    document = BASE | {name: value}
    read = compare(document, tmp_path)
    if read:
        return
    try:
        parse_settings(str(tmp_path / "config.yaml"), [])
    except TaopdError:
        return
    # Right, and left to the parser: what no recipe has. The first value of the others is a usual one.
    rare = ("fp16", "optim", "anchor_coef", "teacher_url", "collapse_guard", "learning_rate")
    rare += ("teacher_column", "teacher_weights", "budget_scope")  # with one teacher
    assert name in rare or value != VALUES[name][0]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
@pytest.mark.parametrize("equals", [False, True])
def test_every_value_as_a_flag(name, value, equals, tmp_path):
    """Where the file holds another value, or none; written as a shell has it."""
    text = str(value).lower() if isinstance(value, bool | None) else str(value)
    flags = [f"--{name}={text}"] if equals else [f"--{name}", text]
    document = BASE | ({name: VALUES[name][0]} if equals else {})
    read = compare(document, tmp_path, flags)
    assert not read or type(value) in (int, float, bool, str)
    if (name, value) in USUAL_FLAGS:
        assert compare(BASE, tmp_path, flags)


USUAL_FLAGS = [
    *[("gradient_window", 4), ("per_device_train_batch_size", 6), ("selector", "full")],
    *[("method", "published"), ("gradient_checkpointing", False), ("temperature", 1.0)],
    *[("max_completion_length", 700), ("loss", "forward_kl"), ("dataset_train_split", "test")],
]
"""Those of a plan that asks "what if"; they need no parser."""


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_window"],
        ["gradient_window", "4"],
        ["--gradient_window", "4", "--gradient_window", "8"],
        ["--gradient_window", "04"],
        ["--gradient_window", "4.0"],
        ["--gradient_window", "-1"],
        ["--gradient_window", "\u0664"],
        ["--gradient_window", ""],
        ["--use_cpu"],
        ["--use_cpu", "True"],
        ["--model_name_or_path", "~/m"],
        ["--model_name_or_path", "a b"],
        ["--model_name_or_path", "a=--gradient_window", "4"],
        ["--gradient-window", "4"],
        ["--no_such_setting", "4"],
    ],
    ids=str,
)
def test_other_flags_are_left_to_the_parser(flags, tmp_path):
    assert not compare(BASE, tmp_path, flags)


def test_recipes_are_plain(tmp_path):
    plain = {
        path.name
        for path in RECIPES.glob("*.yaml")
        if compare(yaml.safe_load(path.read_text()), tmp_path)
    }
    assert {"qwen3-14b-to-4b.yaml", "qwen3-4b-to-1.7b.yaml", "smollm2.yaml"} <= plain
    assert {"tiny.yaml", "two-teachers.yaml"} <= plain
    assert not plain & {"teacher-quantized.yaml", "tools.yaml"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_shape_without_transformers_is_that_with_it(family, tmp_path):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 77}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model(family, **({} if family == "gpt2" else sizes))
    config.save_pretrained(tmp_path)
    plain = known_shapes._plain_shape(str(tmp_path))
    full = ModelShape.from_config(AutoConfig.from_pretrained(tmp_path), name=str(tmp_path))
    assert plain == (None if family == "gpt2" else full)
    assert load_shape(str(tmp_path)) == full
    # What a file leaves to the class is not guessed.
    document = json.loads((tmp_path / "config.json").read_text())
    document.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert known_shapes._plain_shape(str(tmp_path)) is None


@pytest.mark.parametrize("kind", ["one", "several", "lab", "labs"])
def test_a_plan_of_a_plain_config_loads_no_library_and_says_the_same(
    kind, micro_lab, tmp_path, capsys, monkeypatch
):
    """Oracles: the modules that a process of its own has loaded; the slow way, which a flag forces."""
    teacher = str(micro_lab.teacher)
    document = {
        "one": BASE | {"teacher_model_name_or_path": teacher},
        "several": SEVERAL | {"teachers": {"a": {"model": teacher}, "b": {"model": teacher}}},
        "lab": OF_LAB,
        "labs": OF_LAB | {"lab": "dialect+fallible"},
    }[kind]
    if kind in ("one", "several"):
        document |= {
            "model_name_or_path": str(micro_lab.student),
            "dataset_name": str(micro_lab.prompts),
        }
    else:
        monkeypatch.setenv("TAOPD_CACHE", str(tmp_path))
        for variant in document["lab"].split("+"):
            build_as_if(variant, micro_lab)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    argv = ["plan", "--config", str(path), "--json"]
    code = (
        "import sys, json; from taopd.cli import main; main(json.loads(sys.argv[1]));"
        "print(sorted(n for n in ('torch', 'transformers', 'trl', 'datasets') if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    printed, loaded = done.stdout.rstrip().rsplit("\n", 1)
    assert loaded == "[]"
    slow = []
    monkeypatch.setattr(plan_command, "_from_config", recorded(plan_command._from_config, slow))
    cli.main([*argv, "--adam_epsilon", "1e-8"])
    assert slow
    assert json.loads(printed) == json.loads(capsys.readouterr().out)


def recorded(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def build_as_if(variant, made):
    """A finished lab of the cache, whose files are those of another one."""
    spec = LabSpec(variant=variant)
    folder = build.default_root() / spec.folder_name()
    shutil.copytree(made.student, folder / "student")
    shutil.copytree(made.teacher, folder / "teacher")
    shutil.copy(made.prompts, folder / build.PROMPTS)
    rules = {"top_k": 4, "max_completion_length": 9, "answer_pattern": ""}
    (folder / build.MANIFEST).write_text(json.dumps({"spec": spec.to_dict(), "sha256": {}} | rules))
