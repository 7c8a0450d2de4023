"""Settings of a run that goes on: two spellings of one value are no change, another value is one."""

import json

import pytest

from taopd.errors import ConfigError
from taopd.trainer.checkpoint.resume import changed_settings


def begun(path, **settings):
    """A run that began with these settings."""
    (path / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("teacher_weights", None, {"code": 1.0}),
        ("teacher_weights", {"code": 1}, {}),
        ("teacher_weights", {"code": 0.5, "math": 1.0}, {"code": 0.5}),
        ("chat_template_kwargs", None, {}),
        ("chat_template_kwargs", {}, None),
        ("stop_token_ids", [], None),
        ("stop_token_ids", (), []),
    ],
    ids=str,
)
def test_another_spelling_is_no_change(tmp_path, name, before, now):
    begun(tmp_path, **{name: before})
    assert changed_settings(tmp_path, 3, {name: now}, allowed=False) == []


@pytest.mark.parametrize(
    ("name", "before", "now", "words"),
    [
        ("teacher_weights", None, {"code": 0.0}, "teacher_weights.code None -> 0.0"),
        ("teacher_weights", {"code": 0.5}, {"code": 1.0}, "teacher_weights.code 0.5 -> 1.0"),
        ("teacher_weights", {"code": 0.5}, None, "teacher_weights.code 0.5 -> None"),
        (
            "chat_template_kwargs",
            {},
            {"thinking": False},
            "chat_template_kwargs.thinking None -> F",
        ),
        ("stop_token_ids", [0], [], "stop_token_ids.0 0 -> None"),
        ("weight_decay", 0.0, None, "weight_decay 0.0 -> None"),
        ("bf16", False, None, "bf16 False -> None"),
    ],
    ids=str,
)
def test_another_value_is_refused_by_name(tmp_path, name, before, now, words):
    begun(tmp_path, **{name: before})
    with pytest.raises(ConfigError) as error:
        changed_settings(tmp_path, 3, {name: now}, allowed=False)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text", ["[]", "{", "null", "3", '"x"', '{"changes": 3}', "\x00\N{BULLET}"]
)
def test_settings_that_are_no_document_of_ours_are_told_and_not_compared(tmp_path, text, caplog):
    begun(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert changed_settings(tmp_path, 3, {"budget": 0.1}, allowed=False) == []
    assert "no settings of the run so far" in caplog.text
