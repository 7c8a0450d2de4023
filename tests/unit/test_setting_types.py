"""Every setting of ours given as another type, in Python, YAML and flags. Oracle: its annotation."""

import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from trl import DistillationConfig

from taopd.errors import ConfigError
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings_file import parse_settings

TRLS = {each.name for each in dataclasses.fields(DistillationConfig)}
HINTS = typing.get_type_hints(TeachabilityConfig)
OWN = sorted({each.name for each in dataclasses.fields(TeachabilityConfig)} - TRLS | {"beta"})
COMPARED = ["gradient_accumulation_steps", "max_completion_length", "max_steps", "temperature"]
VALUES = ["text", 3, 2.5, True, ["x"], [True], {"a": 1}, {1, 2}, b"x", object, np.zeros(2)]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), np.float32("nan")]
BASE = {"lab": "dialect", "output_dir": "unused", "use_cpu": True, "bf16": False}


def config(**settings):
    return TeachabilityConfig("unused", bf16=False, use_cpu=True, **settings)


def allows(hint, value):
    """Whether the annotation, read by itself, allows the value."""
    words = str(hint if typing.get_args(hint) else hint.__name__)
    kinds = set(re.findall(r"\b(str|int|float|bool|dict|list)\b", words))
    if isinstance(value, list):
        inside = re.search(r"list\[(\w+)\]", words)
        return inside is not None and {"str": str, "int": int}[inside[1]] is type(value[0])
    return type(value).__name__ in kinds or (type(value) is int and "float" in kinds)


@pytest.mark.parametrize("name", [*OWN, *COMPARED])
def test_a_value_of_another_type_is_refused_by_name(name):
    wrong = [value for value in VALUES if not allows(HINTS[name], value)] + NOT_FINITE
    assert len(wrong) > 8
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}={re.escape(repr(value))}: must be "):
            config(**{name: value})


@pytest.mark.parametrize("wrong", [-1e-9, *NOT_FINITE[:3], "text", True])
@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "adam_epsilon", "adam_beta1", "adam_beta2"]
)
def test_a_number_that_no_optimizer_takes_is_refused_before_anything_loads(name, wrong):
    """Oracle: torch, which refuses all of these numbers or would train on them."""
    with pytest.raises(ConfigError, match=rf"^{name}={re.escape(repr(wrong))}: must be "):
        config(**{name: wrong})
    if name in ("adam_beta1", "adam_beta2"):
        with pytest.raises(ConfigError, match=f"^{name}=1.0: must be"):
            config(**{name: 1.0})
    assert getattr(config(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("name", ["output_dir", "dataset_name", "model_name_or_path"])
def test_a_name_without_a_text_is_no_folder(name, value, tmp_path):
    names = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dict.fromkeys(names, "x") | {"use_cpu": True, "bf16": False}))
    told = f"^{name}={value!r}: must be text that is not empty"
    with pytest.raises(ConfigError, match=told):
        parse_settings(str(path), [f"--{name}", value])
    path.write_text(yaml.safe_dump(dict.fromkeys(names, "x") | {name: value}))
    with pytest.raises(ConfigError, match=told):
        parse_settings(str(path), [])


@pytest.mark.parametrize("name", OWN)
def test_the_same_from_a_file(name, tmp_path):
    """Text is left out: in a file, text that reads as a number is one."""
    wrong = [value for value in ({"a": 1}, [True], True) if not allows(HINTS[name], value)]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {name: wrong[-1]}))
    with pytest.raises(ConfigError, match=rf"\b{name}=.*(expected|must be)"):
        parse_settings(str(path), [], lab=no_lab)


def test_a_number_in_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lab: dialect\nteachers: {a: {timeout_s: .nan}}\n")
    with pytest.raises(ConfigError, match="timeout_s: nan is no number below"):
        parse_settings(str(path), [], lab=no_lab)


NUMBERS = [name for name in OWN if re.search(r"\b(int|float)\b", str(HINTS[name]))]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, ("many", "nan", "inf")[place % 3]) for place, name in enumerate(NUMBERS)],
)
def test_the_same_from_a_flag(name, value):
    flags = [part for given, held in BASE.items() for part in (f"--{given}", str(held))]
    with pytest.raises(ConfigError, match=rf"\b{name}\b.*(must be|invalid)"):
        parse_settings(None, [*flags, f"--{name}", value], lab=no_lab)


def no_lab(variant):
    raise AssertionError("the settings were accepted")


def test_numbers_of_numpy_and_tuples_and_paths_are_pythons():
    made = config(
        budget=np.float32(0.25),
        score_top_k=np.int64(4),
        shadow_selectors=("random",),
        stop_tokens="exclude",
        stop_token_ids=(np.int32(2), 1),
        teacher_model_name_or_path=Path("a/b"),
    )
    assert (made.budget, made.score_top_k, made.shadow_selectors) == (0.25, 4, ["random"])
    assert (made.stop_token_ids, made.teacher_model_name_or_path) == ([2, 1], "a/b")
    kinds = [type(each) for each in (made.budget, made.score_top_k, *made.stop_token_ids)]
    assert kinds == [float, int, int, int]
    made.to_json_string()


def test_a_setting_of_one_of_several_teachers_and_a_server_are_named():
    for entry, told in (
        ({"model": 3}, "teacher 'a': teacher_model_name_or_path=3: must be text"),
        ({"model": "x", "timeout_s": "long"}, "teacher 'a': teacher_timeout_s='long': must be"),
    ):
        with pytest.raises(ConfigError, match=told):
            config(teachers={"a": entry})
    with pytest.raises(ConfigError, match=r"teacher_server='vlm' is unknown.*'vllm'"):
        config(teacher_server="vlm")
