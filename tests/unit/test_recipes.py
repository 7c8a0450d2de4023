"""Recipes. Oracles: the published scripts' settings, written out here, and the config dataclass."""

from dataclasses import fields
from pathlib import Path

import pytest

from taopd.cli import main
from taopd.cli.lab_paths import lab_settings, with_lab_paths
from taopd.errors import ConfigError
from taopd.experiments.smollm2.pair import Pair
from taopd.experiments.smollm2.real import STEPS, real_study
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import load_study_file
from taopd.experiments.study.run import base_config
from taopd.runs.validation import read_yaml
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings_file import parse_settings

RECIPES = Path(__file__).parents[2] / "recipes"
LAB = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "p"}
PUBLISHED = {
    "qwen3-4b-to-1.7b": ("Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B"),
    "qwen3-8b-grpo-to-4b": ("path/to/qwen3-8b-grpo", "Qwen/Qwen3-4B"),
    "qwen3-14b-to-4b": ("Qwen/Qwen3-14B", "Qwen/Qwen3-4B"),
    "r1-distill-14b-to-qwen2.5-3b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "Qwen/Qwen2.5-3B"),
}
TEACHERS = {"teacher-gguf", "teacher-offload", "teacher-quantized", "teacher-server", "tools"}
FOLDERS = {"accelerate", "paper", "studies", "verl"}
STUDIES = sorted(path for name in ("paper", "studies") for path in (RECIPES / name).glob("*.yaml"))


def test_there_are_no_other_recipes():
    others = {"smollm2", "smollm2-self", "teacher-prompt", "teacher-server", "tiny", "two-teachers"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*PUBLISHED, *TEACHERS, *others}
    # A recipe's tools are imported by other tests.
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == FOLDERS
    assert {path.stem for path in (RECIPES / "paper").iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_every_key_arrives(path):
    settings = parse_settings(str(path), ["--use_cpu", "true"], lab=lambda variant: LAB)
    resolved = settings.resolved()
    for key, value in read_yaml(path, "the recipe").items():
        # transformers turns report_to: none into an empty list; use_cpu is this test's own flag.
        if key not in ("use_cpu", "report_to"):
            assert str(getattr(resolved[key], "value", resolved[key])) == str(value), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    settings = parse_settings(str(RECIPES / f"{name}.yaml"), ["--use_cpu", "true"])
    args = settings.training
    teacher, student = PUBLISHED[name]
    assert (args.teacher_model_name_or_path, settings.model.model_name_or_path) == (
        teacher,
        student,
    )
    assert (args.adam_beta1, args.adam_beta2, args.learning_rate) == (0.9, 0.98, 1e-6)
    assert (args.lr_scheduler_type, args.weight_decay, args.temperature) == ("constant", 0.1, 1.0)
    assert (args.score_top_k, args.selector, args.loss) == (
        16,
        "teachability",
        "sampled_reverse_kl",
    )
    assert (args.budget, args.num_generations) == (0.1, 2)
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert completions == 4 * 2
    assert (args.max_steps, args.max_completion_length) in {(50, 64), (151, 256)}
    assert "DAPO-Math-17k" in settings.script.dataset_name
    head = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "2605.26844" in head and f"taopd train --config recipes/{name}.yaml" in head
    assert "The paper does not give" in " ".join(head.replace("#", " ").split())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_expands_and_says_its_command(path):
    study = load_study_file(path)
    arms = expand(study, base_config(study))
    if study.full_control:
        assert all(arm.controls["full"] for arm in arms if arm.settings["selector"] != "full")
    head = path.read_text().split("\n\n")[0]
    assert f"taopd compare {path.relative_to(RECIPES.parent)}" in head


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_studies(name):
    """The main table's selectors and random at the four budgets, full, and the recipe's settings."""
    study = load_study_file(RECIPES / "paper" / f"{name}.yaml")
    selectors = ("teachability", "teachability+entropy", "tip", "entropy", "random")
    expected = {f"{s}@{b}%" for s in selectors for b in (5, 10, 30, 50)} | {"full"}
    assert {arm.name for arm in expand(study, base_config(study))} == expected
    assert len(study.seeds) >= 3
    recipe = read_yaml(RECIPES / f"{name}.yaml", "the recipe")
    assert (study.teacher, study.student) == PUBLISHED[name]
    assert study.prompts == recipe["dataset_name"]
    for key, value in study.config.items():
        assert recipe[key] == value, key


def test_the_recipe_the_studies_and_the_demo_of_smollm2_are_one_setting():
    """They differ in what they are there to vary, and nowhere else."""
    study = load_study_file(RECIPES / "studies" / "smollm2.yaml")
    rates = load_study_file(RECIPES / "studies" / "smollm2-rates.yaml")
    more = load_study_file(RECIPES / "studies" / "smollm2-cpu.yaml")
    demo = real_study(Pair(Path("runs/smollm2")))
    for name in ("student", "teacher", "prompts", "match", "random_control", "full_control"):
        assert getattr(study, name) == getattr(rates, name) == getattr(demo, name), name
        assert getattr(more, name) == getattr(demo, name), name
    for name in ("config", "evaluate_every"):
        assert getattr(more, name) == getattr(demo, name), name
    assert all(arm in more.arms for arm in demo.arms)
    steps = {"max_steps": STEPS}
    assert study.config | steps == rates.config == demo.config
    assert rates.arms == demo.arms == [arm for arm in study.arms if arm in demo.arms]
    assert rates.config["learning_rate"] in rates.rates
    path = RECIPES / "smollm2.yaml"
    recipe = parse_settings(str(path), []).resolved()
    # As `run_arm` makes an arm on a CPU.
    on_cpu = {"use_cpu": True, "bf16": False, "report_to": "none", "seed": 0}
    arm = study.config | {"selector": "teachability", "method": "reach"} | on_cpu
    wanted = TeachabilityConfig(output_dir=recipe["output_dir"], save_steps=20, **arm).to_dict()
    own = {field.name for field in fields(TeachabilityConfig)} & wanted.keys() & recipe.keys()
    ours = {"dataset_name", "model_name_or_path", "teacher_model_name_or_path", "run_name"}
    values = [{k: str(getattr(d[k], "value", d[k])) for k in own - ours} for d in (recipe, wanted)]
    differing = {key for key in own - ours if values[0][key] != values[1][key]}
    assert not differing, differing
    assert [recipe[f"{kind}model_name_or_path"] for kind in ("", "teacher_")] == [
        study.student,
        study.teacher,
    ]
    assert recipe["dataset_name"] == study.prompts


def test_a_lab_stands_for_models_and_prompts_and_excludes_others(tmp_path, capsys):
    """`lab: dialect` fills the three names; beside one of them, or an unknown one, it is an error."""
    path = RECIPES / "tiny.yaml"
    settings = parse_settings(str(path), [], lab=lambda variant: LAB)
    resolved = settings.resolved()
    assert {name: resolved[name] for name in LAB} == LAB
    assert resolved["lab"] == settings.changed()["lab"] == "dialect"
    with pytest.raises(ConfigError, match="drop dataset_name, or lab"):
        parse_settings(str(path), ["--dataset_name", "p"], lab=lambda variant: LAB)
    with pytest.raises(ConfigError, match=r"no lab is called 'dialekt'.*dialect"):
        parse_settings(str(path), ["--lab", "dialekt"], lab=lab_settings)
    for command in (["train", "--config"], ["check"], ["plan", "--config"]):
        config = tmp_path / "config.yaml"
        config.write_text("lab: dialect+dialekt\noutput_dir: x\nbudget: 7.0\n")
        assert main([*command, str(config)]) == 2
        assert "no lab is called 'dialekt'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="lab: dialect stands for"):
        parse_settings(None, ["--output_dir", str(tmp_path), "--use_cpu", "true"])
    with pytest.raises(ConfigError, match="dialekt"):
        with_lab_paths(["lab:dialekt/student"])


def test_a_lab_behind_an_equals_sign_is_one_too(monkeypatch, capsys):
    monkeypatch.setattr("taopd.cli.lab_paths._path", lambda variant, name: f"/{variant}/{name}")
    assert with_lab_paths(["--model=lab:dialect/student", "--x=a=lab:b/c", "lab:dialect"]) == [
        "--model=/dialect/student",
        "--x=a=lab:b/c",
        "lab:dialect",
    ]
    monkeypatch.undo()
    assert main(["evaluate", "--data=lab:dialekt/prompts.parquet"]) == 2
    assert "no lab is called 'dialekt'" in capsys.readouterr().err


def test_changed_settings_are_those_that_somebody_set(tmp_path):
    """Not what follows from them (beta, run_name, ...), nor a value that is the default."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "lab: dialect\noutput_dir: x\nuse_cpu: true\nbudget: 0.1\nbf16: false\nloss: jsd\n"
    )
    settings = parse_settings(str(path), ["--seed=3"], lab=lambda variant: LAB)
    assert settings.changed() == {
        **{"lab": "dialect", "use_cpu": True, "bf16": False, "loss": "jsd", "seed": 3}
    }
