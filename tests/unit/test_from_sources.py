"""taopd run from its sources, as on a node without a network: nothing installed knows the name taopd.

Oracle: the version in the code. It is what every record must name.
"""

import importlib.metadata
import json

import pytest

import taopd
from taopd import cli
from taopd.trainer.environment import environment
from tests.e2e.test_trainer import make_trainer
from tests.unit.test_cli_diagnose import freeze_argv


@pytest.fixture(autouse=True)
def not_installed(monkeypatch):
    found = importlib.metadata.Distribution.from_name

    def without_taopd(name):
        if name == "taopd":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_taopd)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("taopd")


def versions(path):
    return json.loads(path.read_text())["versions"]


def test_a_bank_records_the_version(micro_lab, tmp_path):
    argv = freeze_argv(micro_lab, tmp_path / "bank")
    assert cli.main([str(argument) for argument in argv]) == 0
    assert versions(tmp_path / "bank" / "manifest.json")["taopd"] == taopd.__version__


def test_a_run_records_the_version_everywhere(micro_lab, tmp_path):
    make_trainer(micro_lab, tmp_path, max_steps=1).train()
    run = tmp_path / "run"
    assert versions(run / "env.json") == environment()["versions"]
    assert versions(run / "env.json")["taopd"] == taopd.__version__
    assert json.loads((run / ".taopd-run").read_text()) == {"taopd": taopd.__version__}
    assert f"taopd {taopd.__version__} trained" in (run / "README.md").read_text()
