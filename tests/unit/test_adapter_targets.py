"""`lora_target_modules` as it is written: a name alone, a list of one, a pattern. Oracle: peft on a model."""

import pytest
from trl import get_peft_config

from taopd import cli
from taopd.errors import ConfigError
from taopd.experiments.arm_student import split_settings
from taopd.trainer.settings_file import parse_settings
from tests.conftest import make_model, write_config

SOME = r".*layers\.1\.mlp\.(up|down)_proj"


def adapted(weights):
    """Modules of a micro model that the settings put an adapter on."""
    from peft import get_peft_model

    model = get_peft_model(make_model(seed=0), get_peft_config(weights)).get_base_model()
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}),
        (["self_attn.q_proj"], {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}),
        ([SOME], {f"model.layers.1.mlp.{name}_proj" for name in ("up", "down")}),
        (
            ["q_proj", "v_proj"],
            {f"model.layers.{n}.self_attn.{c}_proj" for n in (0, 1) for c in "qv"},
        ),
    ],
    ids=["a name", "a part of a path", "a pattern", "names"],
)
@pytest.mark.parametrize("where", ["file", "text in a file", "flag", "study"])
def test_a_list_of_one_name_is_that_name(micro_lab, tmp_path, targets, expected, where):
    """TRL made it a text, and peft a pattern: "Target modules q_proj not found"."""
    if where == "text in a file" and len(targets) > 1:
        pytest.skip("a text is one name")
    if where == "study":
        weights = split_settings({"use_peft": True, "lora_target_modules": targets})[1]
    else:
        written = {"file": targets, "text in a file": targets[0], "flag": None}[where]
        path = write_config(micro_lab, tmp_path, use_peft=True, lora_target_modules=written)
        flags = ["--lora_target_modules", *targets] if where == "flag" else []
        weights = parse_settings(path, flags).model
    assert adapted(weights) == expected


@pytest.mark.parametrize("command", ["train", "check", "plan"])
def test_what_is_no_pattern_is_refused_by_name(micro_lab, tmp_path, capsys, command):
    path = write_config(micro_lab, tmp_path, use_peft=True, lora_target_modules=".*[01.mlp")
    given = [str(path)] if command == "check" else ["--config", str(path)]
    assert cli.main([command, *given]) == 2
    told = capsys.readouterr().err
    assert "lora_target_modules='.*[01.mlp' is no regular expression (unterminated" in told
    assert len(told.splitlines()) == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is no regular expression"):
        split_settings({"use_peft": True, "lora_target_modules": [".*[01.mlp"]})
