"""The examples run as they are printed, on a lab that is smaller than the one users get."""

import base64
import difflib
import json
import runpy
from pathlib import Path

import pytest
import torch

from taopd.experiments import lab as lab_room
from taopd.experiments.lab import build_lab
from tests.scripted_server import ScriptedServer

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SIZES = {
    "num_train_prompts": 200,
    "num_test_prompts": 20,
    "teacher_steps": 30,
    "student_steps": 30,
    "teacher_width": 16,
    "student_width": 16,
    "parallel": False,
}


@pytest.fixture(scope="module")
def small_lab(tmp_path_factory):
    return build_lab("dialect", root=tmp_path_factory.mktemp("labs"), **SIZES)


def run(name: str, small_lab, folder: Path, monkeypatch, *arguments: str) -> dict:
    """Names that the script leaves; `build_lab` is the only thing that is replaced."""
    monkeypatch.setattr(lab_room, "build_lab", lambda variant: small_lab)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_trains_to_its_end(name, small_lab, tmp_path, monkeypatch, capsys):
    from taopd.selectors import SELECTORS

    try:
        left = run(name, small_lab, tmp_path, monkeypatch)
    finally:
        SELECTORS.pop("sure_but_wrong", None)
    trainer = left["trainer"]
    assert trainer.state.global_step == trainer.args.max_steps > 1
    assert Path(trainer.args.output_dir).is_dir()
    printed = capsys.readouterr().out
    assert printed
    if name == "trl_script.py":
        return
    kept = [
        entry["select/kept_fraction"]
        for entry in trainer.state.log_history
        if "select/kept_fraction" in entry
    ]
    # A share of a batch is rounded up to whole tokens; method reach keeps less where less is within reach.
    assert all(entry <= trainer.args.budget + 0.02 for entry in kept)
    if trainer.args.method != "reach":
        assert all(entry >= trainer.args.budget - 0.02 for entry in kept)
    if name == "lora.py":
        assert (tmp_path / "runs/lora/merged/model.safetensors").is_file()
    if name == "served_teacher.py":
        assert trainer.teacher_model is None
        teacher = json.loads((tmp_path / "runs/served/teacher.json").read_text())
        assert teacher["kind"] == "sglang" and teacher["exact"]
    if name == "own_selector.py":
        assert "kept by it or by teachability" in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_argument_that_an_example_does_not_take_is_one_line(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(name, None, tmp_path, monkeypatch, "--steps", "5")
    out, told = capsys.readouterr()
    assert left.value.code == 2 and not out and told.count("\n") == 1 and "--steps" in told
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        run(name, None, tmp_path, monkeypatch, "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and "Run it: python examples/" in told


@pytest.fixture
def deaf():
    """The address of a server that is no teacher's."""
    with ScriptedServer(torch.nn.Linear(1, 1)) as server:
        server.get = lambda path: None
        yield server.url


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://h:99999", None])
def test_a_teacher_that_is_not_there_is_one_line(
    url, deaf, small_lab, tmp_path, monkeypatch, capsys
):
    url = url or deaf
    with pytest.raises(SystemExit) as left:
        run("served_teacher.py", small_lab, tmp_path, monkeypatch, url)
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and told[-1].startswith("served_teacher.py: error: ")
    assert url in told[-1] and "Traceback" not in told


@pytest.mark.parametrize("text", ["", "hello", "[]", "{}", '{"cells": [1]}', '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_one_line(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.ipynb"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["scripts.notebook", str(path)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES.parent / "scripts/notebook.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1 and str(path) in told
    assert path.read_text() == text


def test_an_example_is_short_and_named_in_the_list():
    listed = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) >= 6
    for name in SCRIPTS:
        assert len((EXAMPLES / name).read_text().splitlines()) < 60, name
        assert f"({name})" in listed, f"examples/README.md does not name {name}"


def test_from_trl_is_a_diff_of_three_lines():
    old, new = (
        (EXAMPLES / name).read_text().splitlines() for name in ("trl_script.py", "from_trl.py")
    )
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    assert len(old) == len(new)
    assert [sum(line[0] == sign for line in changed) for sign in "-+"] == [3, 3]
    assert all(("Distillation" in line) == (line[0] == "-") for line in changed)


def test_the_notebook_runs_and_its_outputs_are_those_of_its_cells(small_lab, tmp_path, monkeypatch):
    from scripts.notebook import execute

    cells = json.loads((EXAMPLES / "diagnostic.ipynb").read_text())["cells"]
    committed = [cell.get("outputs", []) for cell in cells]
    kinds = [[each["output_type"] for each in outputs] for outputs in committed]
    assert ["display_data"] in kinds and "error" not in str(kinds)
    monkeypatch.setattr(lab_room, "build_lab", lambda variant: small_lab)
    monkeypatch.chdir(tmp_path)
    left = execute(cells)
    assert [[each["output_type"] for each in cell.get("outputs", [])] for cell in cells] == kinds
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    before, after = (left["gain"].tokens[f"forward_kl{end}"] for end in ("", "_after"))
    assert left["summary"]["gain_forward_nats/mean"] == pytest.approx((before - after).mean())
    (picture,) = (output[0]["data"] for output in committed if output[:1] and "data" in output[0])
    assert base64.b64decode(picture["image/png"]).startswith(b"\x89PNG")
