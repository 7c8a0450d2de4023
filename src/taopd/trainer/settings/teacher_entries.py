"""The settings of several teachers, and what they say of each: one teacher's settings as of a run with one.

    teachers:
      math: {model: Qwen/Qwen3-4B}
      code: {url: "http://localhost:8000", model: Qwen/Qwen3-14B}
    teacher_weights: {code: 0.5}

An entry has the names of a single teacher's settings without the prefix `teacher_`. What it leaves out is as
the setting of a single teacher says.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from taopd.errors import ConfigError, DataError, TaopdError, require, require_known, suggest
from taopd.runs.validation import parse_json
from taopd.teachers import Teacher
from taopd.trainer.settings.config_checks import CHOICES, check_config
from taopd.trainer.settings.setting_types import check_types
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

OF_ONE = {
    "model": "teacher_model_name_or_path",
    "revision": "teacher_model_revision",
    "init_kwargs": "teacher_model_init_kwargs",
    "url": "teacher_url",
    "server": "teacher_server",
    "concurrency": "teacher_concurrency",
    "timeout_s": "teacher_timeout_s",
    "patience_s": "teacher_patience_s",
    "quantization": "teacher_quantization",
    "offload": "teacher_offload",
}
"""The settings of an entry, and those of a single teacher that they stand for."""
ALONE = (
    "teacher_model_name_or_path",
    "teacher_model_revision",
    "teacher_model_init_kwargs",
    "teacher_url",
)
"""Settings that say who a single teacher is."""
_SMALLEST = 1e-30
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def read_teachers(config: "TeachabilityConfig") -> None:
    """Read the mappings from their JSON text if they come as flags."""
    teachers = _mapping("teachers", config.teachers)
    if teachers is not None:
        # A path or URL alone says who teaches, here as in Python.
        teachers = {name: entry_of(name, entry, None)[1] for name, entry in teachers.items()}
    config.teachers = teachers
    config.teacher_weights = _mapping("teacher_weights", config.teacher_weights)
    given = [name for name in ALONE if getattr(config, name) is not None]
    if config.teachers is not None and given:
        raise ConfigError(f"teachers and {given[0]}: one of them says who teaches; drop the other")


def check_teachers(config: "TeachabilityConfig", teachers: Mapping[str, Any]) -> None:
    """Refuse names, entries and weights that do not fit.

    Args:
        teachers: by name an entry of `teachers`, or a teacher as `TeachabilityTrainer` takes one.
    """
    if not teachers:
        raise ConfigError("teachers is empty: name at least one, {math: {model: ...}}")
    for name, entry in teachers.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"teachers: {name!r} is no name: use ASCII letters, digits, '_', '-' and '.', and begin "
                "with a letter or a digit"
            )
        _refuse_own(name, entry.get("model") if isinstance(entry, Mapping) else entry)
        if isinstance(entry, Mapping):
            _check_entry(name, entry)
            settings_of(config, name, entry)
    weights = config.teacher_weights or {}
    assert isinstance(weights, dict)
    for name, weight in weights.items():
        if name not in teachers:
            raise ConfigError(
                f"teacher_weights: no teacher is called {name!r}.{suggest(name, teachers)}"
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        # In float32 a smaller one is 0, and a larger one infinite.
        fits = number and _SMALLEST <= weight <= 1 / _SMALLEST
        require(fits, f"teacher_weights: {name}", weight, f"above 0, from {_SMALLEST:g} to 1e+30")


def settings_of(
    config: "TeachabilityConfig", name: str, entry: Mapping[str, Any]
) -> "TeachabilityConfig":
    """The settings of a run in which this teacher is the only one."""
    # Not through `__init__`: not every resolved value passes TRL's checks twice.
    own = copy.copy(config)
    own.teachers = None
    for key, value in entry.items():
        setattr(own, OF_ONE[key], value)
    with naming(name):
        check_types(own, choices=CHOICES)
        # TRL reads JSON text only where it makes a config.
        options = own.teacher_model_init_kwargs
        own.teacher_model_init_kwargs = _mapping("init_kwargs", options)
        check_config(own)
    return own


@contextmanager
def naming(name: str) -> Iterator[None]:
    """A block whose errors begin with the name of the teacher that they are about."""
    try:
        yield
    except TaopdError as error:
        start = f"teacher {name!r}: "
        if str(error).startswith(start):
            raise
        raise type(error)(f"{start}{error}") from error


def entry_of(
    name: str, teacher: Any, entry: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """A teacher as `TeachabilityTrainer` takes one (None: the entry says it), and the rest of its entry.

    Args:
        teacher: a model, `Teacher`, path, URL or entry; entry: that of `teachers`, where there is one.
    """
    if isinstance(teacher, Mapping):
        return None, dict(teacher)
    if isinstance(teacher, str):
        key = "url" if teacher.startswith(("http://", "https://")) else "model"
        return None, {key: teacher}
    if isinstance(teacher, torch.nn.Module):
        # It was loaded with them.
        loading = ("model", "revision", "init_kwargs", "quantization", "url")
        return teacher, {key: value for key, value in (entry or {}).items() if key not in loading}
    if isinstance(teacher, Teacher):
        return teacher, dict(entry or {})
    raise ConfigError(
        f"teacher {name!r} is a {type(teacher).__name__}: give a model, its path, a URL, or an object with "
        "the methods of taopd.teachers.Teacher"
    )


def same_teachers(before: Any, now: Any) -> bool:
    """Whether two values of `teachers` differ in nothing but where and how servers are asked."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return False
    return _without_addresses(before) == _without_addresses(now)


def _without_addresses(teachers: dict[str, Any]) -> dict[str, Any]:
    asked = {"url", "server", "concurrency", "timeout_s", "patience_s"}
    return {
        name: {key: value for key, value in entry.items() if key not in asked}
        | {"url": "url" in entry}
        for name, entry in teachers.items()
    }


def _mapping(setting: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = parse_json(value, setting)
        except DataError as error:
            raise ConfigError(str(error)) from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{setting}={value!r}: must be a mapping from the names of teachers")
    return value


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    for key in entry:
        require_known(f"teachers: {name}: the setting", key, OF_ONE)
    if entry.get("model") is None and entry.get("url") is None:
        raise ConfigError(f"teachers: {name} has neither model nor url: set one of them")


def _refuse_own(name: str, model: Any) -> None:
    if isinstance(model, str) and model in OWN_TEACHERS:
        raise ConfigError(
            f"teachers: {name}: the student cannot be one of several teachers ({model!r}). Alone it can: "
            f"leave out teachers and set teacher_model_name_or_path: {model}"
        )
