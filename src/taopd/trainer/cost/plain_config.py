"""The settings that `taopd plan` needs of a plain config, without TRL and torch, whose import takes seconds.

What: `plain_config` reads a YAML file whose keys and values are all in the tables below, and gives what
`settings_file.parse_settings` would give, as far as a plan reads it. Any other key or value, also a wrong
one, gives None: then the parser of `taopd train` reads the file, and says what is wrong with it.

Why tables and not TRL's dataclasses: importing these takes 4 s of CPU, a plan 0.1 s. A test compares the
defaults with the dataclasses, and the plans of all recipes and of drawn configs with those of the parser.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from taopd.errors import ConfigError, require
from taopd.runs.config_file import read_config
from taopd.runs.versions import installed_version
from taopd.trainer.cost.settings import BYTES, PlanSettings, settings_of
from taopd.trainer.settings.methods import METHODS, fill_in
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

Test = Callable[[Any], bool]

LOSSES = {"reverse_kl": True, "forward_kl": True, "sampled_reverse_kl": False}
"""Of the usual ones, which read the teacher's full distribution."""
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/accel")
"""Where an accelerator shows itself."""

_PLAIN_VALUE = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?|[A-Za-z_][A-Za-z0-9_./-]*", re.ASCII)
"""What a flag may hold: whole and decimal numbers, truth values, names and paths."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
"""Of one of several teachers, or of a lab."""


def _whole(least: int) -> Test:
    return lambda value: type(value) is int and value >= least


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e6


def _share(value: Any) -> bool:
    return type(value) is float and 0.0 < value <= 1.0


def _one_of(*known: str) -> Test:
    return lambda value: isinstance(value, str) and value in known


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _name(value: Any) -> bool:
    plain = isinstance(value, str) and bool(value.strip()) and not value.lower().endswith(".gguf")
    return plain and "$" not in value and "~" not in value and value not in OWN_TEACHERS


def _teachers(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in value)
        and all(isinstance(entry, dict) and entry.keys() == {"model"} for entry in value.values())
        and all(_name(entry["model"]) for entry in value.values())
    )


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(each) and each > 1e-6 for each in value.values())


def _dtype(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"dtype"} and value["dtype"] in BYTES


DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 512,
    "selector": "teachability",
    "budget": 0.1,
    "score_top_k": 16,
    "loss": "reverse_kl",
    "method": None,
    "reduction": "token_mean",
    "budget_schedule": "constant",
    "budget_end": None,
    "num_generations": 1,
    "num_iterations": 1,
    "gather_limit": 10_000_000,
    "gradient_window": None,
    "prefix_memory_mib": 8192,
    "gradient_checkpointing": True,
    "optim": "adamw_torch_fused",
    "log_update_norm": True,
    "match_update_norm": None,
    "max_update_norm": None,
    "collapse_guard": "warn",
    "bf16": None,
    "fp16": False,
    "use_cpu": False,
    "model_init_kwargs": None,
    "teacher_model_init_kwargs": None,
    "teacher_url": None,
    "teacher_quantization": None,
    "teacher_offload": None,
    "dataset_train_split": "train",
    "dtype": "float32",
    "use_peft": False,
    "lora_r": 16,
    "load_in_4bit": False,
    "load_in_8bit": False,
}
"""Of what a plan reads, by setting."""
_READ: dict[str, Test] = {
    "model_name_or_path": _name,
    "teacher_model_name_or_path": _name,
    "teachers": _teachers,
    "dataset_name": _name,
    "output_dir": _name,
    "dataset_train_split": _name,
    "per_device_train_batch_size": _whole(1),
    "gradient_accumulation_steps": _whole(1),
    "max_completion_length": _whole(1),
    "score_top_k": _whole(1),
    "num_generations": _whole(1),
    "gradient_window": _whole(0),
    "lora_r": _whole(1),
    "budget": _share,
    "anchor_fraction": _share,
    "selector": _one_of("teachability", "full", "random", "entropy"),
    "loss": _one_of(*LOSSES),
    "method": _one_of(*METHODS),
    "dtype": _one_of(*BYTES),
    "gradient_checkpointing": _flag,
    "bf16": _flag,
    "use_cpu": _flag,
    "use_peft": _flag,
    "log_update_norm": _flag,
    "model_init_kwargs": _dtype,
    "teacher_model_init_kwargs": _dtype,
}
_WITHOUT_EFFECT: dict[str, Test] = {
    "learning_rate": lambda value: _number(value) and value > 0,
    "weight_decay": _number,
    "adam_beta1": lambda value: type(value) is float and 0.0 < value < 1.0,
    "adam_beta2": lambda value: type(value) is float and 0.0 < value < 1.0,
    "temperature": lambda value: _number(value) and value > 0,
    "lr_scheduler_type": _one_of("constant", "linear", "cosine"),
    "warmup_steps": _whole(0),
    "max_steps": _whole(1),
    "logging_steps": _whole(1),
    "save_steps": _whole(1),
    "save_total_limit": _whole(1),
    "seed": lambda value: _whole(0)(value) and value < 2**32,
    "log_rollouts": _whole(0),
    "report_to": _one_of("none"),
}
_OF_SEVERAL: dict[str, Test] = {
    "teacher_column": _name,
    "teacher_weights": _weights,
    "budget_scope": _one_of("global", "teacher"),
}
"""Without effect on a plan too, where there are several teachers; else left to the parser."""
_BY_LAB = ("model_name_or_path", "teacher_model_name_or_path", "teachers", "dataset_name")
"""What the setting `lab` stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainConfig:
    """What a plan reads of a config."""

    student: str
    teachers: tuple[str, ...]
    dataset: str
    split: str
    settings: PlanSettings
    """Of a run with any of the teachers alone, with the default length of prompts."""


def default_settings(given: Mapping[str, Any]) -> PlanSettings:
    """What a plan reads of a run with these settings, all others as they are by default."""
    args = SimpleNamespace(**(dict.fromkeys(METHODS["anchored"]) | DEFAULTS | dict(given)))
    fill_in(args)
    args.bf16 = args.bf16 is not False
    # In a plan 0 says that no token is held; in a run that is said by the method.
    require(0 < args.anchor_fraction <= 1, "anchor_fraction", args.anchor_fraction, "in (0, 1]")
    return settings_of(
        args,
        args,
        needs_teacher_distribution=LOSSES[args.loss],
        reads_initial=args.compatibility == "reach",
    )


def plain_flags(flags: Sequence[str]) -> dict[str, Any] | None:
    """Settings given as `--name value` or `--name=value`; None: not all are, or not certain to be.

    Example:
        >>> plain_flags(["--gradient_window", "8", "--method=published"])
        {'gradient_window': 8, 'method': 'published'}
    """
    # A value may hold "=" too: then it is none of the plain ones below.
    parts = (flag.split("=", 1) if flag.startswith("--") else [flag] for flag in flags)
    words = [word for part in parts for word in part]
    names, values = words[::2], words[1::2]
    if len(words) % 2 or not all(name.startswith("--") for name in names):
        return None
    given: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        # A number, a word or a truth value as YAML and the parser both read it.
        if not _PLAIN_VALUE.fullmatch(value) or name[2:] in given:
            return None
        written = value in ("true", "false") or value[0].isdecimal()
        given[name[2:]] = json.loads(value) if written else value
    return given


def plain_config(
    path: str,
    flags: Sequence[str] = (),
    *,
    lab: Callable[[str], Mapping[str, Any]] | None = None,
) -> PlainConfig | None:
    """The file's settings, with these in their place; None: not plain, or not certain to be.

    Args:
        lab: as `settings_file.parse_settings` takes it.
    """
    more = plain_flags(flags)
    if more is None:
        return None
    given = _given(read_config(path) | more, lab)
    if given is None:
        return None
    teachers = [each["model"] for each in given.pop("teachers", {}).values()]
    # Of any of them: a plan reads no more of the name than whether the student is its own teacher.
    given.setdefault("teacher_model_name_or_path", *teachers[:1])
    try:
        settings = default_settings(given)
    except ConfigError:
        return None
    known = DEFAULTS | given
    device = _device(known)
    if device is None or settings.num_rows % known["num_generations"]:
        return None
    return PlainConfig(
        student=known["model_name_or_path"],
        teachers=tuple(teachers) or (known["teacher_model_name_or_path"],),
        dataset=known["dataset_name"],
        split=known["dataset_train_split"],
        settings=replace(settings, device=device),
    )


def _given(
    written: dict[str, Any], lab: Callable[[str], Mapping[str, Any]] | None
) -> dict[str, Any] | None:
    """The settings with those that a lab stands for; None: not plain, or one that is needed is missing."""
    tests, given = _READ | _WITHOUT_EFFECT, dict(written)
    variant = given.pop("lab", None)
    if variant is not None:
        plain = isinstance(variant, str) and all(map(_PLAIN_NAME.fullmatch, variant.split("+")))
        if lab is None or not plain or any(name in given for name in _BY_LAB):
            return None
        if "+" in variant:
            tests |= _OF_SEVERAL
    if "teachers" in given:
        tests |= _OF_SEVERAL
    if not all(name in tests and tests[name](value) for name, value in given.items()):
        return None
    if "lora_r" in given and "use_peft" not in given:  # which the parser refuses
        return None
    if variant is not None and lab is not None:  # once the rest is plain: it may have to be built
        given |= lab(variant)
    several = given.get("teachers")
    teacher = "teachers" if several is not None else "teacher_model_name_or_path"
    needed = ("model_name_or_path", teacher, "dataset_name", "output_dir")
    if not all(name in given for name in needed):
        return None
    if several is not None and (
        any(name in given for name in ("teacher_model_name_or_path", "teacher_model_init_kwargs"))
        or not set(given.get("teacher_weights", ())) <= set(several)
    ):
        return None
    return given


def _device(known: Mapping[str, Any]) -> str | None:
    """The device that the run would train on, as far as that can be told without torch."""
    if known["use_cpu"]:
        return "cpu"
    if not _without_accelerator(os.environ):
        return None
    # transformers refuses bf16 on such a machine: then the plan is for another one.
    return "cpu" if known["bf16"] is False else "gpu"


def _without_accelerator(environment: Mapping[str, str]) -> bool:
    """Whether torch can have no accelerator here, nor another process beside this one."""
    if any(name.startswith(("ACCELERATE_", "WORLD_SIZE")) for name in environment):
        return False
    torch = installed_version("torch")
    if torch is None:
        return False
    if torch.endswith("+cpu"):
        return True
    import sys

    return sys.platform == "linux" and not any(Path(name).exists() for name in _DEVICES)
