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
from taopd.trainer.settings.number_checks import OTHERS, RANGES
from taopd.trainer.settings_file import TrainSettings, parse_settings

TRLS = {each.name for each in dataclasses.fields(DistillationConfig)}
HINTS = typing.get_type_hints(TeachabilityConfig)
OWN = sorted({each.name for each in dataclasses.fields(TeachabilityConfig)} - TRLS | {"beta"})
READ = ["gradient_accumulation_steps", "max_completion_length", "max_steps", "temperature"]
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


@pytest.mark.parametrize("name", [*OWN, *READ])
def test_a_value_of_another_type_is_refused_by_name(name):
    wrong = [value for value in VALUES if not allows(HINTS[name], value)] + NOT_FINITE
    assert len(wrong) > 8
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}={re.escape(repr(value))}: must be "):
            config(**{name: value})


NUMERIC = {
    name
    for name in TRLS
    if re.search(r"\b(int|float)\b", f"{HINTS[name]} {getattr(HINTS[name], '__name__', '')}")
}


def test_every_number_of_trl_and_transformers_has_a_range():
    """A new one is refused nothing until somebody says what it may be."""
    assert NUMERIC - set(RANGES) == set(OTHERS) and len(NUMERIC) > 40


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_a_number_that_makes_no_sense_is_refused_by_name_before_anything_loads(name, tmp_path):
    """From Python and from a file. Oracle: transformers and torch, which refuse them later, or train on."""
    path = tmp_path / "run.yaml"
    for wrong in (-3, -1e-9, *NOT_FINITE, 10**30, 10**400, 1e30, True, [1]):
        with pytest.raises(ConfigError, match=rf"^{name}={re.escape(repr(wrong))}: must be "):
            config(**{name: wrong})
        if not isinstance(wrong, np.floating):
            path.write_text(yaml.safe_dump(BASE | {name: wrong}))
            with pytest.raises(ConfigError, match=rf"\b{name}\b.*(must be|expected|is no number)"):
                parse_settings(str(path), [], lab=no_lab)


ZERO_IS_WRONG = (
    *("max_steps", "num_train_epochs", "temperature", "save_total_limit"),
    *("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("logging_steps", "save_steps", "max_completion_length", "eval_accumulation_steps"),
    *("torch_empty_cache_steps", "ddp_timeout", "top_p", "repetition_penalty"),
)


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_zero_is_refused_where_it_means_no_run(name):
    if name in ZERO_IS_WRONG:
        with pytest.raises(ConfigError, match=rf"^{name}=0: must be "):
            config(**{name: 0})
    elif name not in ("beta", "dataloader_prefetch_factor", "pad_to_multiple_of") and not (
        name.startswith(("vllm_", "ddp_"))
    ):
        assert getattr(config(**{name: 0}), name) == 0


def test_a_learning_rate_of_zero_is_said(caplog):
    config(learning_rate=1e-5)
    assert "learning_rate" not in caplog.text
    config(learning_rate=0)
    assert "learning_rate=0: nothing trains" in caplog.text


def test_a_setting_that_trls_trainer_passes_over_is_said(caplog):
    config()
    assert "has no effect" not in caplog.text
    config(train_sampling_strategy="sequential", label_smoothing_factor=0.1, data_seed=3)
    assert "train_sampling_strategy=sequential has no effect: TRL's sampler" in caplog.text
    assert "label_smoothing_factor=0.1 has no effect: the loss" in caplog.text
    assert "data_seed=3 has no effect: TRL's sampler takes the order of the prompts" in caplog.text


@pytest.mark.parametrize(
    ("switch", "read"),
    [
        ("use_vllm", {"vllm_gpu_memory_utilization": 0.5}),
        ("use_liger_kernel", {"liger_kernel_config": {"rope": True}}),
        ("log_completions", {"num_completions_to_print": 3}),
        ("dataloader_num_workers", {"dataloader_multiprocessing_context": "spawn"}),
    ],
)
def test_a_setting_of_what_is_switched_off_is_said(switch, read, caplog):
    config(**{switch: True if switch != "dataloader_num_workers" else 1}, **read)
    assert "has no effect" not in caplog.text
    config(**read)
    assert f"has no effect without {switch}" in caplog.text
    with pytest.raises(
        ConfigError, match=r"^dataloader_multiprocessing_context='thread' is unknown"
    ):
        config(dataloader_num_workers=1, dataloader_multiprocessing_context="thread")


def test_an_interval_of_zero_is_allowed_where_nothing_happens_in_intervals():
    for what in ("logging", "save", "eval"):
        name, steps = f"{what}_steps", {f"{what}_strategy": "steps"}
        assert getattr(config(**{name: 0, f"{what}_strategy": "no"}), name) == 0
        for wrong in (0, 1.5):
            with pytest.raises(
                ConfigError, match=rf"^{name}={wrong}: must be .*{what}_strategy='no'"
            ):
                config(**{name: wrong} | steps)
        assert getattr(config(**{name: 0.25} | steps), name) == 0.25
    with pytest.raises(ConfigError, match=r"^adam_beta1=1.0: must be"):
        config(adam_beta1=1.0)
    # Nothing is clipped; transformers 5.23 compares the number with 0.
    assert config(max_grad_norm=None).max_grad_norm == 0.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"save_strategy": "stepz"}, "save_strategy='stepz' is unknown. Did you mean 'steps'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin' is unknown. Did you mean"),
        ({"optim": "adamw_torchh"}, "optim='adamw_torchh' is unknown. Did you mean"),
        ({"optim": 3}, "optim=3 is unknown. Known: "),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing='no': must be true or false"),
        ({"use_vllm": 2}, "use_vllm=2: must be true or false"),
        ({"pad_to_multiple_of": "eight"}, "pad_to_multiple_of='eight': must be a whole number"),
        ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs='x': must be a mapping"),
        (
            {"lr_scheduler_kwargs": '{"a": 1, "a": 2}'},
            "lr_scheduler_kwargs=.*: the key 'a' stands twice",
        ),
        ({"accelerator_config": 3}, "accelerator_config=3: must be a mapping"),
        ({"accelerator_config": "no.json"}, "accelerator_config='no.json': no such file"),
        ({"deepspeed": __file__}, "deepspeed=.*: must be a mapping; deepspeed: not JSON"),
        ({"parallelism_config": {"cp_size": 2}}, "parallelism_config=.*: must be a Parallelism"),
        ({"ddp_backend": "gloo"}, "ddp_backend is of several processes"),
        ({"report_to": 3}, "report_to=3: must be None or text or a list of texts"),
    ],
)
def test_a_setting_of_transformers_of_another_kind_is_named(settings, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        config(**settings)


def test_no_and_off_are_words_in_a_file_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "lab: dialect\noutput_dir: x\nuse_cpu: yes\nbf16: no\nsave_strategy: no\ncollapse_guard: off\n"
    )
    names = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
    made = parse_settings(str(path), [], lab=lambda variant: dict.fromkeys(names, "x")).training
    assert (made.save_strategy.value, made.collapse_guard) == ("no", "off")


@pytest.mark.parametrize(
    ("name", "wrong"), [("lora_r", 0), ("lora_alpha", -1), ("lora_dropout", 1.5)]
)
def test_a_number_of_an_adapter_that_makes_no_sense_is_named(name, wrong, tmp_path):
    path = tmp_path / "run.yaml"
    given = dict.fromkeys(("model_name_or_path", "teacher_model_name_or_path", "dataset_name"), "x")
    settings = {key: value for key, value in BASE.items() if key != "lab"} | given
    path.write_text(yaml.safe_dump(settings | {"use_peft": True, name: wrong}))
    with pytest.raises(ConfigError, match=f"^{name}={wrong}: must be"):
        parse_settings(str(path), [])


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


def test_a_path_or_an_address_stands_for_a_teacher_among_several():
    made = config(teachers={"a": "x/y", "b": {"model": "x/z"}})
    assert made.teachers == {"a": {"model": "x/y"}, "b": {"model": "x/z"}}
    assert TrainSettings.of_python(made).reads()[2:] == ("x/y", "x/z")
    # As flags have it, and what teaches behind a server.
    made = config(teachers='{"a": "http://localhost:9"}', loss="sampled_reverse_kl")
    assert made.teachers == {"a": {"url": "http://localhost:9"}}
    for entry in (None, 3, ["x"]):
        with pytest.raises(
            ConfigError, match=f"teacher 'a' is a {type(entry).__name__}: give a model"
        ):
            config(teachers={"a": entry})
