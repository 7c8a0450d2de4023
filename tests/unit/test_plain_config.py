"""The quick reading of a config for `taopd plan`. Oracles: the parser of `taopd train`, and transformers."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taopd import cli
from taopd.errors import TaopdError
from taopd.models.plain_prompts import OTHER_COLUMNS, longest_prompt
from taopd.models.prompt_rows import COLUMNS, MEDIA
from taopd.models.prompts import encode_prompts, load_prompts, load_tokenizer
from taopd.models.teacher_prompts import COLUMN as TEACHER_PROMPT
from taopd.trainer.cost import ModelShape, known_shapes, load_shape
from taopd.trainer.cost.plain_config import DEFAULTS, plain_config
from taopd.trainer.cost.settings import plan_settings
from taopd.trainer.settings_file import make_parser, parse_settings
from tests.conftest import make_tokenizer

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
    "learning_rate": [1e-5, "1e-5", -1.0],
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
}


def test_the_defaults_are_those_of_the_dataclasses():
    # fp16 and bf16 as they are before TRL fills them in.
    fields = {
        each.name: each.default
        for kind in make_parser().dataclass_types
        for each in dataclasses.fields(kind)
    }
    made = {name: fields[name] for name in DEFAULTS if name != "loss"}
    assert made == {name: value for name, value in DEFAULTS.items() if name != "loss"}
    from taopd.trainer.config_checks import loss_of_beta

    assert DEFAULTS["loss"] == loss_of_beta(None)


def compare(document: dict, folder: Path, flags: Sequence[str] = ()) -> bool:
    """Hold the quick reading to the parser's; whether it was one."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    quick = plain_config(str(path), flags)
    if quick is None:
        return False
    parsed = parse_settings(str(path), [*flags, "--use_cpu", "true"])
    device = quick.settings.device
    assert dataclasses.replace(plan_settings(parsed), device=device) == quick.settings
    assert device == ("cpu" if document.get("use_cpu") or document.get("bf16") is False else "gpu")
    named = (parsed.model.model_name_or_path, parsed.training.teacher_model_name_or_path)
    assert named == (quick.student, quick.teacher)
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


def test_the_recipes_of_one_teacher_are_plain(tmp_path):
    plain = {
        path.name
        for path in RECIPES.glob("*.yaml")
        if compare(yaml.safe_load(path.read_text()), tmp_path)
    }
    assert {"qwen3-14b-to-4b.yaml", "qwen3-4b-to-1.7b.yaml", "smollm2.yaml"} <= plain
    assert not plain & {"two-teachers.yaml", "teacher-quantized.yaml", "tools.yaml", "tiny.yaml"}


TEMPLATE = (
    "{% for m in messages %}\n  <bos> {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %} w1 w2{% endif %} {{ bos_token }}"
)
CHATS = [[{"role": "user", "content": f"3 + 4 {'w3 ' * n}="}] for n in (1, 5, 2)]


@pytest.mark.parametrize("kind", ["text", "chat", "split", "more"])
def test_the_longest_prompt_is_that_of_transformers(kind, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["1 + 2 =", "w1 w2 w3 1 + 2 =", "w1 w2 w3 w4 w5 w6 2 ="]
    prompts = CHATS if kind == "chat" else texts
    frame = pd.DataFrame({"prompt": prompts})
    if kind == "split":
        frame["split"] = ["train", "train", "test"]
    if kind == "more":  # as the prompts of `make real` have a solution
        frame["solution"], frame["level"] = "text", 3
    frame.to_parquet(tmp_path / "p.parquet")
    found = longest_prompt(tmp_path / "model", tmp_path / "p.parquet", "train", most=2000)
    rows = load_prompts(str(tmp_path / "p.parquet"), split="train")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert found == max(map(len, encode_prompts(loaded, list(rows))))


def test_every_column_that_makes_a_prompt_is_left_to_transformers():
    assert {*COLUMNS, *MEDIA, TEACHER_PROMPT} - {"prompt"} == OTHER_COLUMNS


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        ({"prompt": ["a", ""]}, None),
        ({"prompt": ["a"], "tools": ["[]"]}, None),
        ({"prompt": ["a"], "teacher_prompt": ["b"]}, None),
        ({"prompt": [[{"role": "assistant", "content": "a"}]]}, TEMPLATE),
        ({"prompt": CHATS[:1]}, None),
        ({"prompt": CHATS[:1]}, "{{ strftime_now('%Y') }}"),
        ({"prompt": CHATS[:1]}, "{{ raise_exception('no') }}"),
    ],
)
def test_what_is_not_certain_is_left_to_transformers(rows, template, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    assert longest_prompt(tmp_path / "model", tmp_path / "p.parquet", "train", most=9) is None


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


def test_a_plan_of_a_plain_config_loads_no_library_and_says_the_same(micro_lab, tmp_path, capsys):
    """Oracles: the modules that a process of its own has loaded; the slow way, which a flag forces."""
    document = BASE | {
        "model_name_or_path": str(micro_lab.student),
        "teacher_model_name_or_path": str(micro_lab.teacher),
        "dataset_name": str(micro_lab.prompts),
    }
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
    cli.main([*argv, "--seed", "1"])
    assert json.loads(printed) == json.loads(capsys.readouterr().out)
