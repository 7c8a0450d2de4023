"""A settings file as JSON, and the `config.json` of a run as a settings file."""

import json

import pytest
import yaml

from taopd import cli
from taopd.errors import ConfigError
from taopd.runs.config_file import read_config
from taopd.runs.jsonl import write_json
from taopd.trainer.settings_file import parse_settings

SETTINGS = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "prompts.parquet",
    "output_dir": "run",
    "learning_rate": 1e-5,
    "adam_epsilon": 1e-9,
    "max_steps": 7,
    "budget": 0.05,
    "selector": "teachability*compatible",
    "method": "published",
    "report_to": "none",
    "use_peft": True,
    "lora_target_modules": ["q_proj", "v_proj"],
    "chat_template_kwargs": {"enable_thinking": False, "name": "é\u2028😀"},
    "use_cpu": True,
    "bf16": False,
}


def _parsed(path):
    return parse_settings(str(path), [])


@pytest.mark.parametrize("left_out", [(), ("learning_rate", "use_peft", "lora_target_modules")])
def test_the_config_of_a_run_gives_its_settings_again(tmp_path, left_out):
    wanted = {name: value for name, value in SETTINGS.items() if name not in left_out}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(wanted))
    first = _parsed(tmp_path / "given.yaml")
    # As `taopd train` writes it.
    written = {"command": "train", "changed": first.changed()} | first.resolved()
    write_json(tmp_path / "config.json", written)

    again = _parsed(tmp_path / "config.json")

    assert again.resolved() == first.resolved()
    assert again.changed() == first.changed()


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_config_file_may_be_json(tmp_path, ascii_only):
    (tmp_path / "given.json").write_text(json.dumps(SETTINGS, ensure_ascii=ascii_only))
    assert read_config(tmp_path / "given.json") == SETTINGS


@pytest.mark.parametrize("opening", ["# of a colleague\n", "\ufeff"])
def test_a_json_file_may_hold_what_yaml_allows_beside_it(tmp_path, opening):
    plain = {name: value for name, value in SETTINGS.items() if isinstance(value, str | int)}
    (tmp_path / "given.json").write_text(opening + json.dumps(plain), encoding="utf-8")
    assert read_config(tmp_path / "given.json") == plain


def test_a_json_file_that_is_neither_says_so_once(tmp_path):
    (tmp_path / "given.json").write_text('{"seed": 1')
    with pytest.raises(ConfigError, match=r"^\S*given.json is not YAML: (?!.*not JSON)"):
        read_config(tmp_path / "given.json")


def test_configs_that_cannot_be_run_again_are_refused(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"command": "compare", "arms": []})
    with pytest.raises(ConfigError, match="is of `taopd compare`"):
        read_config(path)
    url = {"teacher_url": "http://***@host:8000"}
    write_json(path, {"command": "train", "changed": url, "output_dir": "run"})
    with pytest.raises(ConfigError, match="teacher_url without its secret"):
        read_config(path)


def test_the_folder_of_the_run_is_not_trained_in_twice(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    changed = SETTINGS | {"output_dir": str(run)}
    write_json(
        run / "config.json", {"command": "train", "changed": changed, "output_dir": str(run)}
    )
    assert cli.main(["train", "--config", str(run / "config.json")]) == 2
    assert f"{run} holds" in capsys.readouterr().err
