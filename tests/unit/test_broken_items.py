"""An item of the check that breaks by a fault of its own: a note, on the command line as in Python."""

import json

import pytest
import yaml

from taopd import cli
from taopd.errors import ConfigError
from taopd.models.prompts import load_prompts
from taopd.preflight import items
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.e2e.test_trainer import CPU, OURS

BROKE = "not looked at: the check itself broke"
PLACES = {
    "an item": lambda patch: patch.setitem(items._ITEMS, "precision", break_down),
    "what several items read": lambda patch: patch.setattr(
        "taopd.preflight.subject.measure_micro_batch", break_down
    ),
}


@pytest.fixture
def settings(micro_lab, tmp_path):
    return (
        CPU
        | OURS
        | {"per_device_train_batch_size": 4, "max_steps": 1, "output_dir": str(tmp_path / "run")}
    )


@pytest.fixture
def path(micro_lab, tmp_path, settings):
    path = tmp_path / "config.yaml"
    models = {
        "model_name_or_path": str(micro_lab.student),
        "teacher_model_name_or_path": str(micro_lab.teacher),
        "dataset_name": str(micro_lab.prompts),
    }
    path.write_text(yaml.safe_dump(settings | models))
    return str(path)


@pytest.fixture
def python(micro_lab, settings):
    """Trains with the look before it."""

    def run():
        TeachabilityTrainer(
            model=str(micro_lab.student),
            teacher_model=str(micro_lab.teacher),
            args=TeachabilityConfig(**settings),
            train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
        ).train(check=True)

    return run


def break_down(*args, **kwargs):
    raise AttributeError("a fault of the check")


@pytest.mark.parametrize("place", PLACES)
def test_the_run_goes_on_and_says_so(path, python, tmp_path, monkeypatch, capsys, caplog, place):
    PLACES[place](monkeypatch)
    assert cli.main(["train", "--config", path]) == 0
    printed = capsys.readouterr().err
    found = json.loads((tmp_path / "run/check.json").read_text())["items"]
    broke = {each["item"] for each in found if each["measured"] == BROKE}
    assert broke and {each["level"] for each in found if each["item"] in broke} == {"warn"}
    for item in broke:
        assert f"check warn: {item}: {BROKE}" in printed
    assert "AttributeError: a fault of the check." in printed
    assert cli.main(["check", path, "--json"]) == 0
    python()
    for item in broke:
        assert f"check: warn: {item}: {BROKE}" in caplog.text


def test_a_verdict_against_the_run_stops_it_all_the_same(
    path, python, tmp_path, monkeypatch, capsys
):
    """A context that is too short beside an item that broke."""
    PLACES["an item"](monkeypatch)
    monkeypatch.setattr(
        "taopd.preflight.subject.Subject.longest_prompt", property(lambda self: 10_000)
    )
    assert cli.main(["train", "--config", path, "--quiet"]) == 2
    assert "the check before training failed (context)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["check", path, "--json"]) == 1
    with pytest.raises(ConfigError, match=r"the check before training failed \(context\)"):
        python()
