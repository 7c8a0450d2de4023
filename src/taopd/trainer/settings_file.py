"""Settings of `taopd train`: a YAML file and flags, with TRL's names, into dataclasses.

TRL's own parser makes the dataclasses. It checks neither the file nor the types of its values (a
YAML value becomes an argparse default as it is), so both are checked here first: unknown keys with
the nearest known one, and values against the type of their field.
"""

import argparse
import os
import re
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NoReturn

from trl import ModelConfig, ScriptArguments, TrlParser

from taopd.errors import ConfigError, require
from taopd.runs.config_file import read_config
from taopd.runs.redaction import redact_document
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.adapter_targets import read_targets
from taopd.trainer.settings.config_checks import refuse_removed
from taopd.trainer.settings.filled import given_otherwise
from taopd.trainer.settings.number_checks import (
    LORA,
    check_adapter_is_asked_for,
    check_ranges,
)
from taopd.trainer.settings.setting_types import fits, type_words
from taopd.trainer.settings.teacher_entries import settings_of
from taopd.trainer.settings.teacher_names import OWN_TEACHERS
from taopd.trainer.settings.teacher_settings import option
from taopd.trainer.settings.usual_names import nearest_setting


@dataclass
class LabArguments:
    """The setting that stands for models and prompts."""

    lab: str | None = option(
        None,
        "Variant of the bundled tiny lab (dialect, bilingual, ...), in place of student, teacher and "
        "prompts; built on first use. Two joined by '+': a teacher from each, for its own prompts.",
    )


_TYPES = (ScriptArguments, TeachabilityConfig, ModelConfig, LabArguments)
# Accepted by TRL's dataclasses, but not what this command does; a flag that is parsed and ignored
# helps nobody.
_REFUSED = {
    "hub_token": "nothing is uploaded; for private models set the environment variable HF_TOKEN",
    "dataset_streaming": "load the dataset in full, or use TeachabilityTrainer from Python",
    "ignore_bias_buffers": "it is a debug switch of other trainers",
    "push_to_hub": "upload <output_dir>/model afterwards, for instance with `hf upload`",
    "trust_remote_code": "code from a model repository is never run",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The resolved dataclasses of one run."""

    script: ScriptArguments
    training: TeachabilityConfig
    model: ModelConfig
    lab: str | None = None
    """The tiny lab that models and prompts are of."""
    given: frozenset[str] = frozenset()
    """Settings that the file or a flag names."""

    @classmethod
    def of_python(cls, training: TeachabilityConfig) -> "TrainSettings":
        """The settings of a trainer whose models and prompts were handed over as objects."""
        return cls(script=ScriptArguments(), training=training, model=ModelConfig())

    def resolved(self) -> dict[str, Any]:
        """Return every setting, defaults included, for `config.json`; secrets are masked."""
        lab = {} if self.lab is None else {"lab": self.lab}
        resolved = asdict(self.script) | self.training.to_dict() | asdict(self.model)
        return redact_document(resolved | lab)

    def of_each_teacher(self) -> "dict[str, TrainSettings]":
        """The settings of a run with each of several teachers alone, by name; with one these, as ""."""
        args = self.training
        if not isinstance(args.teachers, dict):
            return {"": self}
        return {
            name: replace(self, training=settings_of(args, name, entry))
            for name, entry in args.teachers.items()
        }

    def reads(self) -> tuple[str | None, ...]:
        """Models and prompts, as paths or hub ids."""
        each = self.of_each_teacher().values()
        teachers = (one.training.teacher_model_name_or_path for one in each)
        return (self.model.model_name_or_path, self.script.dataset_name, *teachers)

    def changed(self) -> dict[str, Any]:
        """Return the settings that somebody set to another value than the default, for the report."""
        found: dict[str, Any] = {}
        for part in (self.script, self.training, self.model):
            found |= given_otherwise(part, self.given)
        resolved = self.resolved()
        named = {} if self.lab is None else {"lab": self.lab}
        return named | {name: resolved.get(name, value) for name, value in found.items()}


_PERCENT = r"%%|%(?!\(default\))"
"""A percent sign that is one: argparse would take the single ones in texts of libraries for a format."""


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_settings(
    config_file: str | None,
    flags: Sequence[str],
    *,
    lab: Callable[[str], Mapping[str, Any]] | None = None,
    check_lab: Callable[[str], None] = lambda variant: None,
    own: Sequence[str] = (),
) -> TrainSettings:
    """Parse a YAML file and flags, flags first in rank.

    Args:
        lab: gives the names of models and prompts for the setting `lab`; None: it is refused.
        check_lab: refuses a lab that does not exist, before other settings are looked at.
        own: further flags of the command, as help for a misspelt one.
    """
    # Names and types before TRL's parser, which takes an unknown key and a wrong type as they are.
    parser = make_parser()
    config = {} if config_file is None else read_config(config_file)
    _set_environment(config, config_file)
    _check_names([str(key) for key in config], f"key in {config_file}")
    _check_types(config, config_file)
    # As defaults, so that a flag wins over the file.
    parser.set_defaults_with_config(**config)
    named = _flag_names(flags)
    for name, times in Counter(named).items():
        if times > 1:  # argparse would take the last one
            raise ConfigError(f"--{name} is given twice: give it once")
    values, unknown = parser.parse_known_args(list(flags))
    _check_names(_flag_names(unknown), "flag", own)
    if unknown:
        a_file = config_file is None and unknown[0].endswith((".yaml", ".yml"))
        how = f"--config {unknown[0]}" if a_file else "--name value"
        raise ConfigError(
            f"unexpected argument {unknown[0]!r}: {'a file is' if a_file else 'settings are'} given as {how}"
        )
    # Before the dataclasses are made: their own complaints would hide these.
    given = frozenset({*config, *named})
    _check_given(values, given)
    if values.lab is not None:
        check_lab(values.lab)
    try:
        parsed = parser.parse_args_into_dataclasses(args=list(flags), look_for_args_file=False)
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"a package that the settings need is missing: {error}") from error
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"a setting is not valid: {error}") from error
    settings = TrainSettings(
        script=parsed[0],
        training=parsed[1],
        model=parsed[2],
        lab=parsed[3].lab,
        given=given,
    )
    if settings.lab is not None:
        _fill_from_lab(settings, lab)
    _check_supported(settings)
    return settings


def make_parser() -> TrlParser:
    """Return TRL's parser over the dataclasses; its errors are `ConfigError`s."""
    # No abbreviations: one would change its meaning as soon as a setting is added.
    parser = _Parser(_TYPES, prog="taopd train", allow_abbrev=False)
    for action in parser._actions:
        # argparse formats help with %: a bare percent sign would break `--help-all`.
        action.help = re.sub(_PERCENT, "%%", action.help) if action.help else action.help
    return parser


def known_names() -> list[str]:
    """Return every setting that `taopd train` knows."""
    return sorted({field.name for kind in _TYPES for field in fields(kind) if field.init})


def _set_environment(config: dict[str, Any], config_file: str | None) -> None:
    """TRL's `env` key: environment variables for the run."""
    # TRL follows `env` only where it reads the file itself, and checks no names.
    variables = config.pop("env", {})
    if not isinstance(variables, dict):
        raise ConfigError(f"{config_file}: env must be a mapping of environment variables")
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise ConfigError(f"{config_file}: env: {name!r} is no name of an environment variable")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def _check_names(names: Sequence[str], what: str, own: Sequence[str] = ()) -> None:
    refuse_removed(names)
    known = [*known_names(), *(name.lstrip("-") for name in own)]
    for name in names:
        if name not in known:
            hint = nearest_setting(name, known) or " `taopd train --help-all` lists them all."
            raise ConfigError(f"unknown {what}: {name!r}.{hint}")


def _flag_names(arguments: Sequence[str]) -> list[str]:
    flags = [text for text in arguments if text.startswith("--")]
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags]


def _check_types(config: dict[str, Any], config_file: str | None) -> None:
    hints: dict[str, Any] = {}
    for kind in _TYPES:
        hints |= typing.get_type_hints(kind)
    # After the names, so that every key has a type.
    for name, value in config.items():
        if not fits(value, hints[name]):
            raise ConfigError(
                f"{config_file}: {name}={value!r} is of the wrong type; expected {type_words(hints[name])}"
            )


def _fill_from_lab(settings: TrainSettings, lab: Callable[[str], Mapping[str, Any]] | None) -> None:
    """Put the lab's models and prompts in the place of those that a config names."""
    own = (
        "model_name_or_path",
        "teacher_model_name_or_path",
        "teacher_url",
        "teachers",
        "dataset_name",
    )
    # The lab's student may be its own teacher.
    kept = settings.training.teacher_model_name_or_path in OWN_TEACHERS
    own_teacher = {"teacher_model_name_or_path"} if kept else set()
    given = [name for name in own if name in settings.given - own_teacher]
    if given:
        raise ConfigError(f"lab brings its own models and prompts: drop {', '.join(given)}, or lab")
    if lab is None:
        raise ConfigError(f"lab={settings.lab!r}: only the commands of taopd make a lab")
    named = lab(str(settings.lab))
    for name, value in named.items():
        if name in own_teacher:
            continue
        for part in (settings.script, settings.training, settings.model):
            if hasattr(part, name):
                setattr(part, name, value)


def _check_given(values: argparse.Namespace, given: frozenset[str]) -> None:
    """Refuse settings without the required ones."""
    required = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir")
    # null in a file says no more than nothing.
    missing = [name for name in required if name not in given or getattr(values, name) is None]
    # A teacher behind a URL needs no local model; its name then only gives the tokenizer.
    if values.teacher_url is not None or values.teachers is not None:
        missing = [name for name in missing if name != "teacher_model_name_or_path"]
    if values.lab is not None:  # It brings models and prompts.
        missing = [name for name in missing if name == "output_dir"]
    if missing:
        raise ConfigError(
            f"missing: {', '.join(missing)}; set them in the config file or as --{missing[0]} VALUE "
            "(lab: dialect stands for the bundled models and prompts)"
        )
    for name in required:  # Read as a path, no text at all is the folder that one is in.
        value = getattr(values, name, None)
        require(
            not isinstance(value, str) or bool(value.strip()), name, value, "text that is not empty"
        )


def _check_supported(settings: TrainSettings) -> None:
    """Refuse settings of TRL that this command does not follow."""
    check_ranges(settings.model, LORA)
    read_targets(settings.model)
    check_adapter_is_asked_for(settings.given)
    for name, instead in _REFUSED.items():
        holders = (settings.script, settings.training, settings.model)
        if any(getattr(holder, name, False) for holder in holders):
            raise ConfigError(f"{name} is not supported by taopd train: {instead}")


def help_all() -> str:
    """The help text of every setting, with its default."""
    parser = make_parser()
    parser.formatter_class = lambda prog: argparse.ArgumentDefaultsHelpFormatter(
        prog, max_help_position=34, width=100
    )
    parser.usage = "taopd train --config FILE [--name value ...] [--resume] [--overwrite]"
    return parser.format_help()
