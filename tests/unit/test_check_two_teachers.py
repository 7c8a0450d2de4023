"""The commands with several teachers: `train` by the recipe, `check`, `plan`, `inspect`, the page.

Oracles: the lab's files, the weights' sizes, and the rows of the dataset.
"""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM

from taopd import cli
from taopd.cli import lab_paths
from taopd.preflight.subject import Subject, Unnamed
from taopd.trainer.settings_file import parse_settings
from tests.conftest import make_model, make_tokenizer
from tests.scripted_server import ScriptedServer

RECIPE = Path(__file__).parents[2] / "recipes" / "two-teachers.yaml"
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
SMALL += ["--save_strategy", "no", "--max_completion_length", "6"]


@pytest.fixture(scope="module")
def lab(micro_lab, tmp_path_factory):
    """Two variants of a lab by name, each with a student, a teacher and prompts."""
    root = tmp_path_factory.mktemp("labs")
    found = {}
    for name, seed in (("dialect", 1), ("fallible", 7)):
        folder = root / f"{name}-0"
        for role, model_seed, width in (("student", 0, 16), ("teacher", seed, 16 + 8 * seed)):
            make_model(seed=model_seed, hidden_size=width).save_pretrained(folder / role)
            make_tokenizer().save_pretrained(folder / role)
        prompts = folder / "prompts.parquet"
        pd.read_parquet(micro_lab.prompts).to_parquet(prompts)
        parts = {"student": folder / "student", "teacher": folder / "teacher", "prompts": prompts}
        found[name] = type("Lab", (), parts | {"variant": name, "folder": folder})
    return found


@pytest.fixture(autouse=True)
def named(lab, monkeypatch):
    monkeypatch.setattr(lab_paths, "_build", lab.__getitem__)


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    """The recipe, shortened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_paths, "_build", lab.__getitem__)
        folder = tmp_path_factory.mktemp("run") / "run"
        options = ["--config", str(RECIPE), *SMALL, "--output_dir", str(folder), "--quiet"]
        assert cli.main(["train", *options]) == 0
    return folder


def test_the_recipe_trains_with_both(run):
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").open()]
    assert {line["teacher"] for line in lines} == {"dialect", "fallible"}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    counts = [
        [step[f"teacher/completions/{name}"] for name in ("dialect", "fallible")]
        for step in steps
        if "loss" in step
    ]
    assert [sum(count) for count in counts] == [8.0, 8.0] and min(map(min, counts)) > 0
    about = json.loads((run / "teacher.json").read_text())
    assert set(about["teachers"]) == {"dialect", "fallible"}
    config = json.loads((run / "config.json").read_text())
    assert config["teacher_weights"] == {"fallible": 0.5}
    assert set(config["teachers"]) == {"dialect", "fallible"}


def test_a_lab_of_two_has_the_prompts_of_both_with_their_names(lab):
    found = lab_paths.lab_settings("dialect+fallible")
    rows, alone = (pd.read_parquet(p) for p in (found["dataset_name"], lab["dialect"].prompts))
    assert rows["teacher"].value_counts().to_dict() == {
        "dialect": len(alone),
        "fallible": len(alone),
    }
    own = rows[rows["teacher"] == "fallible"].drop(columns="teacher").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, alone)
    assert list(rows["teacher"][:3]) == ["dialect", "fallible", "dialect"]


def test_inspect_shows_the_rollouts_of_one_teacher(run, capsys):
    assert cli.main(["inspect", str(run), "--limit", "50"]) == 0
    both = capsys.readouterr().out
    lines = [json.loads(line)["teacher"] for line in (run / "rollouts.jsonl").open()]
    for name in ("dialect", "fallible"):
        assert both.count(f"teacher {name}") == lines.count(name) > 0
    assert cli.main(["inspect", str(run), "--teacher", "fallible", "--limit", "50"]) == 0
    one = capsys.readouterr().out
    assert one.count("teacher fallible") == both.count("teacher fallible")
    assert "teacher dialect" not in one
    assert cli.main(["inspect", str(run), "--teacher", "falible"]) == 2
    assert "Did you mean 'fallible'" in capsys.readouterr().err


def test_the_page_shows_charts_and_names_of_both(run, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(page)]) == 0
    text = page.read_text()
    assert "<h3>By teacher</h3>" in text
    assert re.search(r"dialect: teacher .*C is exact.* fallible: teacher ", text)
    rollouts = json.loads(re.search(r'id="rollouts">(.*?)</script>', text, re.DOTALL)[1])
    assert {one["teacher"] for one in rollouts["rollouts"]} == {"dialect", "fallible"}


def checked(capsys, *options):
    code = cli.main(["check", str(RECIPE), *SMALL, *options, "--json"])
    found = json.loads(capsys.readouterr().out)["items"]
    return code, {item["item"]: item for item in found}


def test_check_looks_at_each_teacher_on_its_own_prompts(lab, tmp_path, capsys):
    code, found = checked(capsys, "--output_dir", str(tmp_path / "run"))
    levels = {name: item["level"] for name, item in found.items()}
    assert code == int("fail" in levels.values())
    for name in ("tokenizers", "context", "teacher KL", "scoring path", "kept tokens"):
        assert {f"{name} (dialect)", f"{name} (fallible)"} <= found.keys(), name
    assert levels["tokenizers (dialect)"] == levels["scoring path (fallible)"] == "pass"
    kls = [found[f"teacher KL ({name})"]["figures"] for name in ("dialect", "fallible")]
    assert kls[0] != kls[1], "two teachers"
    assert [name for name in found if name.startswith("memory")] == ["memory"]
    assert not (tmp_path / "run").exists()


def test_check_tells_what_is_wrong_with_one(lab, tmp_path, capsys):
    """A server that gives a bound; and a teacher without prompts, which is a warning of its items."""
    known = yaml.safe_load(RECIPE.read_text()) | lab_paths.lab_settings("dialect+fallible")
    del known["lab"]
    rows = pd.read_parquet(known["dataset_name"]).assign(teacher="dialect")
    rows.to_parquet(tmp_path / "prompts.parquet")
    model = AutoModelForCausalLM.from_pretrained(lab["fallible"].teacher)
    with ScriptedServer(model) as server:
        known["teachers"]["fallible"] |= {"url": server.url}
        known["output_dir"] = str(tmp_path / "run")
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(known))
        cli.main(["check", str(path), *SMALL, "--json"])
    items = {one["item"]: one for one in json.loads(capsys.readouterr().out)["items"]}
    assert "C is a lower bound" in items["teacher server (fallible)"]["advice"]
    assert items["bounded C (fallible)"]["figures"].get("kept", 0) > 0, items[
        "bounded C (fallible)"
    ]
    assert "teacher server (dialect)" not in items
    settings = parse_settings(str(path), ["--dataset_name", str(tmp_path / "prompts.parquet")])
    part = Subject(settings=settings).parts["fallible"]
    with pytest.raises(Unnamed, match="No prompt of the training set has 'fallible'"):
        _ = part.prompts


def test_plan_counts_the_weights_of_all(lab, capsys):
    """Oracle: the parameters of both files, in float32."""
    assert cli.main(["plan", "--config", str(RECIPE), *SMALL, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    sizes = [
        4 * AutoModelForCausalLM.from_pretrained(one.teacher).num_parameters()
        for one in lab.values()
    ]
    assert planned["memory_mib"]["teacher_weights"] == pytest.approx(sum(sizes) / 2**20)
    assert planned["teacher"]["num_parameters"] == max(sizes) / 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher_url", "http://127.0.0.1:9"], "drop teacher_url, or lab"),
        (["--teachers", '{"a": {"model": "x"}}'], "no teacher is called 'fallible'. Known: a"),
        (["--teachers", "{a"], "teachers: not JSON"),
        (["--teachers", '{"a": {}, "a": {}}'], "teachers: the key 'a' stands twice"),
        (["--teacher_weights", '{"falible": 1}'], "Did you mean 'fallible'"),
        (["--teacher_column", "domain"], "names no teacher"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, words):
    argv = ["--config", str(RECIPE), *SMALL, "--output_dir", str(tmp_path / "run"), *options]
    assert cli.main(["train", *argv]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
