"""The study file: YAML with what is compared, on what, and what is held equal.

Unknown keys, missing keys and values outside their range are one `ConfigError` each, before anything is
written. `config` and the arms take every field of `TeachabilityConfig`, and those of `trl.ModelConfig` for
LoRA and for loading the student; what the study itself sets (seed, output folder) is refused there. Models
and data come from paths or hub ids, or from a tiny lab by name.
"""

import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from taopd.errors import ConfigError, require, require_known, suggest
from taopd.experiments.arm_student import weight_hints
from taopd.experiments.evaluation.grading import Grader
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.study.analysis import COLLAPSE_POINTS, METRICS
from taopd.runs.validation import read_yaml
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.config_checks import refuse_removed
from taopd.trainer.settings.teacher_names import OWN_TEACHERS
from taopd.trainer.settings.usual_names import nearest_setting

EQUAL = ("steps", "update_norm", "selected_tokens", "seconds")
"""What all arms have in common; docs/guide.md, "Comparing", says what each answers."""
_AMOUNTS = {"update_norm", "selected_tokens", "seconds"}
_SET_BY_STUDY = {
    "seed": "set by seeds, one run per arm and seed",
    "output_dir": "every arm has a folder of its own",
    "match_update_norm": "set by equal: update_norm",
    "model_name_or_path": "that is student here",
    "teacher_model_name_or_path": "that is teacher here",
    "dataset_name": "that is prompts here",
    "num_train_epochs": "an arm's length is max_steps, or what is equal",
    "resume_from_checkpoint": "--resume goes on with every arm from its own checkpoint",
}
_KINDS: dict[Any, tuple[tuple[type, ...], type | None, str]] = {
    str: ((str,), None, "text"),
    bool: ((bool,), None, "true or false"),
    int: ((int,), None, "a whole number"),
    float: ((int, float), None, "a number"),
    dict[str, Any]: ((dict,), None, "a mapping (key: value)"),
    list[int]: ((list,), int, "a list of whole numbers, like [0, 1, 2]"),
    list[float]: ((list,), float, "a list of numbers, like [1.0e-5, 5.0e-5]"),
    list[dict[str, Any]]: (
        (list,),
        dict,
        "a list of mappings, like [{selector: random, budget: 0.1}]",
    ),
}
"""By a field's type: types of its values, of a list's items, and the words for them."""
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFile:
    """The keys of a study file, checked. Paths are as written."""

    title: str = ""
    student: str | None = None
    teacher: str | None = None
    """Path or hub id, or self, self_ema: the student with a prompt of the teacher's own."""
    prompts: str | None = None
    """Column prompt and split "train"; evaluation reads its split "test", with answers."""
    test_prompts: str | None = None
    """A set of its own for evaluation, columns prompt and answer."""
    match: str = "auto"
    lab: str | None = None
    """Variant of the tiny lab, in place of student, teacher, prompts and match."""
    lab_sizes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Settings that all arms share."""
    arms: list[dict[str, Any]] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    """Key to a list of values: one arm per combination."""
    seeds: list[int] = field(default_factory=list)
    rates: list[float] | None = None
    """Learning rates: every arm, controls included, is run at each of them."""
    equal: str = "steps"
    update_norm: float | None = None
    """L2 norm of every parameter update, for equal: update_norm."""
    selected_tokens: int | None = None
    """Kept tokens in all, summed over generation batches, for equal: selected_tokens."""
    seconds: float | None = None
    """Seconds of training, evaluation left out, for equal: seconds."""
    evaluate_every: int | None = None
    num_test_prompts: int | None = None
    max_new_tokens: int | None = None
    """Of evaluation; default the training's max_completion_length."""
    evaluation_batch_size: int = 256
    metric: str = "greedy"
    collapse_points: float = COLLAPSE_POINTS
    random_control: bool = True
    full_control: bool = True
    save_models: bool = False
    workers: int | None = None
    output: str | None = None


def load_study_file(path: str | Path) -> StudyFile:
    """Read and check a study file.

    Raises:
        ConfigError: missing, not YAML, an unknown key, or a value of the wrong type or range.
    """
    return parse_study_file(read_yaml(path, "the study"))


def parse_study_file(loaded: Mapping[str, Any]) -> StudyFile:
    """Check a mapping of study keys and return it as a `StudyFile`.

    Raises:
        ConfigError: as `load_study_file`.
    """
    known = {entry.name for entry in fields(StudyFile)}
    for key in loaded:
        if key not in known:
            hint = suggest(str(key), known)
            if key in settings_hints():
                hint = " It is a training setting: put it under config, arms or grid."
            raise ConfigError(f"unknown key in the study: {key!r}.{hint}")
    hints = typing.get_type_hints(StudyFile)
    study = StudyFile(**{key: _typed(key, value, hints[key]) for key, value in loaded.items()})
    sizes = typing.get_type_hints(LabSpec)
    study = replace(
        study,
        title=" ".join(study.title.split()),  # a heading of one line
        lab_sizes={key: number(key, size, sizes.get(key)) for key, size in study.lab_sizes.items()},
    )
    _check_data(study)
    _check_seeds(study)
    _check_equal(study)
    _check_rates(study)
    check_names(study.config, "config")
    for index, arm in enumerate(study.arms):
        check_names(arm, f"arms[{index}]")
        if (first := study.arms.index(arm)) < index:
            raise ConfigError(
                f"arms[{first}] and arms[{index}] are the same arm: remove one of them"
            )
    check_names(study.grid, "grid")
    for key, column in study.grid.items():
        for index, value in enumerate(column if isinstance(column, list) else ()):
            if value in column[:index]:
                raise ConfigError(f"grid: {key} holds {value!r} twice: remove one of them")
    if not study.arms and not study.grid:
        raise ConfigError("the study has no arms: give arms (a list) or grid (key: list of values)")
    for name in ("evaluate_every", "num_test_prompts", "max_new_tokens", "workers"):
        value = getattr(study, name)
        require(value is None or value >= 1, name, value, "at least 1")
    size, points = study.evaluation_batch_size, study.collapse_points
    require(size >= 1, "evaluation_batch_size", size, "at least 1")
    require(0 < points <= 100, "collapse_points", points, "in (0, 100]")
    require_known("metric", study.metric, METRICS)
    Grader(study.match)
    return study


def settings_hints() -> dict[str, Any]:
    """Type hints of every field that `config`, `arms` and `grid` may set."""
    hints = typing.get_type_hints(TeachabilityConfig)
    training = {entry.name: hints[entry.name] for entry in fields(TeachabilityConfig) if entry.init}
    return training | weight_hints()


def check_names(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that no configuration has, or that the study itself sets.

    Raises:
        ConfigError: with the nearest known name.
    """
    known = settings_hints()
    refuse_removed(settings)
    for key in settings:
        if key in _SET_BY_STUDY:
            raise ConfigError(f"{where}: {key} is not for here ({_SET_BY_STUDY[key]})")
        if key not in known and not (key == "name" and where.startswith("arms")):
            hint = nearest_setting(str(key), known) or suggest(key, known)
            raise ConfigError(f"{where}: unknown key {key!r}.{hint}")


@contextmanager
def within(where: str) -> Iterator[None]:
    """A block whose errors begin with the part of the study that they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Training settings, their values as `number` reads them."""
    hints = settings_hints()
    return {key: number(key, value, hints[key]) for key, value in settings.items()}


def number(key: str, value: Any, hint: Any) -> Any:
    """A YAML value for a field: YAML reads 1e-6 (no dot) as text, which is a number where one belongs.

    Raises:
        ConfigError: text where only a number fits.
    """
    # Of a list the words for the whole of it say more than those for an item.
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = set(typing.get_args(hint)) if union else {hint}
    if not isinstance(value, str) or str in options or not options & {int, float}:
        return value
    try:
        return float(value) if float in options else int(value)
    except ValueError:
        words = "a number" if float in options else "a whole number"
        raise ConfigError(f"{key}={value!r}: must be {words}") from None


def _typed(key: str, value: Any, hint: Any) -> Any:
    kind, *others = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    value = number(key, value, hint)
    if value is None and others:
        return None
    if kind == list[float] and isinstance(value, list):
        value = [_as_float(item) for item in value]
    accepted, items, words = _KINDS[kind]
    # By type, not by instance: true and false are no numbers.
    if type(value) not in accepted or (items and any(type(item) is not items for item in value)):
        raise ConfigError(f"{key}={value!r}: must be {words}")
    return float(value) if kind is float else value


def _as_float(item: Any) -> Any:
    """An item of a list of numbers as one, if it can be read so."""
    try:
        return float(item) if type(item) in (int, str) else item
    except ValueError:
        return item


def _check_data(study: StudyFile) -> None:
    own = ("student", "teacher", "prompts")
    given = [name for name in own if getattr(study, name)]
    if study.lab and study.teacher in OWN_TEACHERS:  # the lab's student
        given.remove("teacher")
    if study.lab:
        given += [
            name for name in ("match", "test_prompts") if getattr(study, name) not in (None, "auto")
        ]
        if given:
            raise ConfigError(
                f"lab brings its own models, prompts and grading: drop {', '.join(given)}, or lab"
            )
    if not study.lab and len(given) < len(own):
        missing = ", ".join(name for name in own if name not in given)
        raise ConfigError(f"the study has no {missing}; name them, or lab: dialect")
    if study.lab_sizes and not study.lab:
        raise ConfigError("lab_sizes needs lab")


def _check_seeds(study: StudyFile) -> None:
    if not study.seeds:
        raise ConfigError("the study has no seeds: give a list, like seeds: [0, 1, 2, 3, 4]")
    if len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        raise ConfigError(f"seeds={study.seeds}: must be different numbers of 0 or more")


def _check_rates(study: StudyFile) -> None:
    rates = study.rates
    if rates is None:
        return
    if not rates:
        raise ConfigError("rates is empty: give a list, like rates: [1.0e-5, 5.0e-5], or drop it")
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ConfigError(f"rates={rates}: must be finite numbers above 0")
    # By the form that names an arm's folder, which has six digits.
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ConfigError(f"rates={rates}: must be different numbers (to six digits)")
    for where, settings in [
        ("grid", study.grid),
        *((f"arms[{i}]", a) for i, a in enumerate(study.arms)),
    ]:
        if "learning_rate" in settings:
            raise ConfigError(
                f"{where}: learning_rate is set by rates, for every arm: drop one of the two"
            )
    own = number("learning_rate", study.config.get("learning_rate", rates[0]), float)
    if own not in rates:
        raise ConfigError(
            f"config: learning_rate={own} is none of rates={rates}; beside rates it names the shared one: "
            "add it to rates, or drop it"
        )
    if study.equal == "update_norm":
        raise ConfigError(
            "rates and equal: update_norm exclude each other: updates of one norm do not depend on the rate"
        )


def _check_equal(study: StudyFile) -> None:
    require_known("equal", study.equal, EQUAL)
    for name in sorted(_AMOUNTS):
        value = getattr(study, name)
        if name == study.equal and not (value and 0 < value < math.inf):
            raise ConfigError(f"equal: {name} needs the common amount, {name}: N above 0")
        if name != study.equal and value is not None:
            raise ConfigError(f"{name} is set but equal is {study.equal}: set equal: {name}")
    if study.equal not in ("selected_tokens", "seconds"):
        return
    name, default = "lr_scheduler_type", "constant" if study.lab else "linear"
    gridded = study.grid.get(name, [])
    schedules = [("config", study.config.get(name, default))]
    schedules += [(f"arms[{i}]", arm[name]) for i, arm in enumerate(study.arms) if name in arm]
    schedules += [("grid", one) for one in (gridded if isinstance(gridded, list) else [gridded])]
    for where, schedule in schedules:
        if schedule not in _CONSTANT_SCHEDULES:
            raise ConfigError(
                f"equal: {study.equal} needs {where}.{name}: constant, because a schedule over max_steps "
                f"would differ between arms that stop at different steps (it is {schedule})"
            )
