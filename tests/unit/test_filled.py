"""What the method fills in is not the user's: copies with another method, and what messages name."""

import copy
import dataclasses
import json
import pickle

import pytest
import yaml
from transformers import HfArgumentParser

from taopd.errors import ConfigError
from taopd.trainer import run_record
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.run_record import changed_by_caller

CHANGES = [
    {"selector": "random"},
    {"selector": "full"},
    {"reduction": "sample_mean"},
    {"method": "anchored"},
    {"method": "published"},
    {"budget": 1.0},
    {"loss": "jsd"},
    {"beta": 0.5},
    {"beta": 0.0},
    {"loss": "sampled_reverse_kl", "teacher_url": "http://127.0.0.1:1"},
    {"anchor_fraction": 0.4, "method": "anchored"},
    {"anchor_coef": 3.0, "method": "anchored"},
    {"compatibility": "mass"},
]
WAYS = {
    "itself": lambda made: made,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "replaced": dataclasses.replace,
}


def config(**settings):
    return TeachabilityConfig("unused", bf16=False, use_cpu=True, **settings)


def settings_of(made):
    """Every setting but objects of transformers' that equal nothing."""
    return json.loads(made.to_json_string())


OTHERS = ({"method": "published"}, {"loss": "forward_kl"})


@pytest.mark.parametrize(
    ("way", "first", "changes"),
    [
        *(("itself", {}, changes) for changes in CHANGES),
        *((way, {}, CHANGES[0]) for way in WAYS if way != "itself"),
        *(("copy", first, {"selector": "random"}) for first in OTHERS),
    ],
    ids=str,
)
def test_a_changed_copy_is_the_config_made_so(way, first, changes):
    """Oracle: the config that is made with the changes at once; there and back again."""
    base = config(**first)
    changed = dataclasses.replace(WAYS[way](base), **changes)
    assert settings_of(changed) == settings_of(config(**first, **changes))
    assert changed_by_caller(changed).keys() - {"use_cpu"} == first.keys() | changes.keys()
    defaults = {each.name: each.default for each in dataclasses.fields(TeachabilityConfig)}
    back = dataclasses.replace(changed, **{name: defaults[name] for name in changes})
    assert settings_of(back) == settings_of(base)


def test_a_setting_that_only_other_versions_of_transformers_have_is_not_missed(monkeypatch):
    """`activation_checkpointing` came with 5.23: without it what the machine decides was the caller's."""
    monkeypatch.setattr(run_record, "_RESOLVED", run_record._RESOLVED | {"of_another_version"})
    made = dataclasses.replace(config(), selector="random")
    assert changed_by_caller(made) == {"selector": "random", "use_cpu": True}


def test_a_setting_that_is_changed_later_counts_when_the_trainer_is_made():
    made = config()
    made.selector = "random"
    assert TeachabilityConfig.of(made, "model") is made
    assert settings_of(made) == settings_of(config(selector="random"))
    made.reach_threshold = "a"
    with pytest.raises(ConfigError, match="reach_threshold='a'"):
        TeachabilityConfig.of(made, "model")


def test_the_given_values_stay_also_where_they_equal_those_filled_in():
    base = config()
    given = dataclasses.replace(base, anchor_coef=float(base.anchor_coef), method="reach")
    moved = dataclasses.replace(given, selector="random")
    assert (moved.method, moved.anchor_coef) == ("reach", 3.0)
    assert dataclasses.replace(given, method="published").anchor_coef == 3.0


def test_a_file_of_the_settings_holds_plain_values_and_makes_the_same_run():
    made = config()
    values = made.to_dict()
    kinds = {
        type(values[name]) for name in ("method", "loss", "beta", "anchor_coef", "compatibility")
    }
    assert kinds == {str, float}
    # transformers masks tokens in what it writes.
    values = {name: value for name, value in values.items() if not name.endswith("_token")}
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert settings_of(TeachabilityConfig(**values)) == settings_of(made)


def test_the_parser_of_transformers_gives_nothing_that_was_left_out():
    flags = ["--output_dir", "unused", "--bf16", "false", "--use_cpu", "true"]
    parser = HfArgumentParser(TeachabilityConfig)
    (made,) = parser.parse_args_into_dataclasses([*flags, "--budget", "0.2"])
    assert settings_of(made) == settings_of(config(budget=0.2))
    assert changed_by_caller(made) == {"budget": 0.2, "use_cpu": True}
    other = dataclasses.replace(made, selector="random")
    assert settings_of(other) == settings_of(config(budget=0.2, selector="random"))
    (read,) = parser.parse_dict({"output_dir": "unused", "bf16": False, "use_cpu": True})
    assert settings_of(read) == settings_of(config())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"anchor_responses": 0.01},
            "anchor_responses=0.01.* at least 0.1 .anchor_fraction unless",
        ),
        ({"anchor_responses": 0.01, "budget": 1.0}, "at least 0.05 .anchor_fraction unless"),
        ({"anchor_responses": 0.2, "anchor_fraction": 0.3}, "at least anchor_fraction=0.3"),
        ({"teacher_url": "http://127.0.0.1:1"}, "^the default loss, reverse_kl, reads"),
        ({"teacher_url": "http://127.0.0.1:1", "beta": 0.5}, "^beta=0.5 reads"),
        ({"teacher_url": "http://127.0.0.1:1", "loss": "jsd"}, "^loss='jsd' reads"),
        ({"budget_end": 0.3}, "^budget_end=0.3 is the end of a schedule: set budget_schedule"),
        ({"budget_schedule": "linear"}, "^budget_schedule='linear' needs budget_end"),
    ],
    ids=str,
)
def test_a_message_shows_no_setting_as_given_that_was_not(given, told):
    with pytest.raises(ConfigError, match=told) as caught:
        config(**given)
    shown = {
        each.name
        for each in dataclasses.fields(TeachabilityConfig)
        if f"{each.name}=" in str(caught.value)
    }
    assert {
        name for name in shown if name not in given and f"set {name}=" not in str(caught.value)
    } == set()


def test_the_completions_that_are_held_are_enough_for_the_tokens_that_were_asked_for():
    made = config(anchor_fraction=0.4, budget=1.0)
    assert (made.anchor_fraction, made.anchor_responses) == (0.4, 0.4)
    assert config(anchor_fraction=0.1, method="anchored").anchor_responses == 0.25
