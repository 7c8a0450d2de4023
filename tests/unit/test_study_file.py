"""Study files and their arms. Oracles: the arms written out by hand, and one message per slip."""

import math

import pytest

from taopd import cli
from taopd.errors import ConfigError
from taopd.experiments.study.expand import expand
from taopd.experiments.study.file import load_study_file, parse_study_file
from taopd.experiments.study.run import base_config

GOOD = {"lab": "dialect", "grid": {"selector": ["tip"], "budget": [0.1]}, "seeds": [0, 1]}
PAIR = {"student": "s", "teacher": "t", "prompts": "p.parquet"}


def arms_of(**keys):
    study = parse_study_file(GOOD | keys)
    return {arm.name: arm for arm in expand(study, base_config(study))}


def test_a_grid_is_a_product_and_gets_its_controls():
    arms = arms_of(grid={"selector": ["teachability", "tip"], "budget": [0.05, 0.1]})
    assert list(arms) == [
        "full",
        *("teachability@5%", "teachability@10%", "tip@5%", "tip@10%"),
        *("random@5%", "random@10%"),
    ]
    assert arms["tip@5%"].settings == {"selector": "tip", "budget": 0.05}
    assert arms["tip@5%"].controls == {"full": "full", "random": "random@5%"}
    assert arms["random@5%"].controls == {"full": "full", "random": None}
    assert arms["full"].controls == {"full": None, "random": None}
    assert {name for name, arm in arms.items() if arm.added} == {"full", "random@5%", "random@10%"}


def test_full_in_a_grid_is_one_arm_and_no_second_control_is_added():
    arms = arms_of(grid={"selector": ["full", "random", "tip"], "budget": [0.05, 0.1]})
    assert next(iter(arms)) == "full" and len(arms) == 5
    assert not any(arm.added for arm in arms.values())


def test_controls_differ_from_their_arm_by_the_selector_alone():
    arms = arms_of(
        grid={}, arms=[{"name": "a", "selector": "tip", "anchor_coef": 1.0, "budget": 0.1}]
    )
    assert list(arms) == ["full", "a", "random@10%,anchor_coef=1.0"]
    control = arms["a"].controls["random"]
    assert arms[control].settings == {"selector": "random", "anchor_coef": 1.0, "budget": 0.1}
    by_loss = arms_of(grid={"selector": ["tip"], "loss": ["jsd", "reverse_kl"]})
    assert by_loss["tip@10%,loss=jsd"].controls == {
        "full": "full,loss=jsd",
        "random": "random@10%,loss=jsd",
    }


def test_controls_can_be_refused():
    assert list(arms_of(random_control=False, full_control=False)) == ["tip@10%"]
    assert list(arms_of(random_control=False)) == ["full", "tip@10%"]


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "lab: dialect\nconfig: {learning_rate: 1e-6}\ngrid: {selector: tip, learning_rate: [1e-5]}\n"
        "lab_sizes: {learning_rate: 1e-3, teacher_steps: 20}\nseeds: [3]\n"
    )
    study = load_study_file(path)
    assert study.lab_sizes == {"learning_rate": 1e-3, "teacher_steps": 20}
    assert base_config(study)["learning_rate"] == 1e-6
    assert expand(study, base_config(study))[1].settings["learning_rate"] == 1e-5


def test_a_title_of_several_lines_is_one_heading(tmp_path):
    (tmp_path / "s.yaml").write_text(
        'lab: dialect\ntitle: "a\\n# b"\ngrid: {selector: tip}\nseeds: [0]\n'
    )
    assert load_study_file(tmp_path / "s.yaml").title == "a # b"


SLIPS = [
    ({"sedes": [1]}, "unknown key in the study: 'sedes'. Did you mean 'seeds'?"),
    ({"budget": 0.1}, "put it under config, arms or grid"),
    ({"config": {"selektor": "tip"}}, "config: unknown key 'selektor'. Did you mean 'selector'?"),
    ({"config": {"lr": 1e-4}}, "config: unknown key 'lr'. Did you mean 'learning_rate'?"),
    ({"grid": {"buget": [0.1]}}, "grid: unknown key 'buget'. Did you mean 'budget'?"),
    ({"arms": [{"selector": "tip", "sed": 1}]}, r"arms\[0\]: unknown key 'sed'"),
    ({"config": {"seed": 3}}, "seed is not for here"),
    ({"config": {"num_train_epochs": 3}}, "num_train_epochs is not for here .*max_steps"),
    ({"config": {"resume_from_checkpoint": "x"}}, "is not for here .*--resume"),
    ({"config": {"eval_strategy": "steps"}}, "drop eval_strategy: .*evaluate_every"),
    ({"arms": [{"eval_on_start": True}]}, "arm 'teachability@10%.*drop eval_on_start"),
    (
        {"config": {"load_best_model_at_end": True, "eval_strategy": False}},
        "drop load_best_model_at_end: a study grades",
    ),
    ({"seeds": []}, "no seeds"),
    *(({"seeds": seeds}, "must be a list of whole numbers, like") for seeds in (3, "three", ["0"])),
    ({"rates": ["fast", 1e-4]}, "must be a list of numbers, like"),
    ({"workers": "two"}, "workers='two': must be a whole number"),
    ({"evaluation_batch_size": 0}, "evaluation_batch_size=0: must be at least 1"),
    ({"seeds": [1, 1]}, "must be different"),
    ({"seeds": [0.5]}, "must be a list of whole numbers"),
    ({"grid": {"budget": [0.1, 5]}}, r"grid: budget=5: must be in \(0, 1\]"),
    ({"arms": [{"budget": 0.1}, {"budget": 10}]}, r"arms\[1\]: budget=10: must be in"),
    ({"arms": [{"budget": 0.1}, {"budget": "ten"}]}, r"arms\[1\]: budget='ten': must be a number"),
    (
        {"arms": [{"selector": "tip", "score_top_k": [4]}]},
        r"arm 'tip@10%,score_top_k=_4_': score_top_k",
    ),
    (
        {"arms": [{"selector": "tip"}, {}, {"selector": "tip"}]},
        r"arms\[0\] and arms\[2\] are the same",
    ),
    ({"grid": {"budget": [0.1, 0.1]}}, "grid: budget holds 0.1 twice"),
    ({"config": {"max_steps": 1.5}}, "config: max_steps=1.5: must be a whole number from 1 on"),
    ({"config": {"max_steps": "many"}}, "config: max_steps='many': must be a whole number"),
    (
        {"arms": [{"selector": "full", "max_steps": -1}]},
        "arm 'full,max_steps=-1': max_steps=-1: must be a whole number from 1 on",
    ),
    ({"lab": None, **PAIR, "match": "regexp:x"}, "match='regexp:x' is unknown"),
    ({"lab": None, **PAIR, "match": "regex:("}, "the pattern does not compile"),
    ({"grid": {"selector": ["full"], "budget": [0]}}, r"budget=0: must be in \(0, 1\]"),
    ({"grid": {"budget": []}}, "budget has no values"),
    ({"grid": {}}, "no arms"),
    ({"grid": {"selector": ["tpi"]}}, "arm 'tpi@10%': .*Did you mean 'tip'"),
    ({"arms": [{"name": "x"}, {"name": "x", "budget": 0.2}]}, "two arms are called 'x'"),
    ({"arms": [{"name": "a/b"}]}, "a name is a folder"),
    ({"arms": [{"name": "random@10%", "selector": "tip"}]}, "would be called 'random@10%'"),
    ({"config": {"learning_rate": "fast"}}, "learning_rate='fast': must be a number"),
    ({"lab": None}, "no student, teacher, prompts"),
    *(({name: "x"}, "lab brings its own") for name in ("student", "match", "test_prompts")),
    ({"lab": None, **PAIR}, "max_steps is missing"),
    ({"lab": None, **PAIR, "config": {"max_steps": 5}}, "max_completion_length is missing"),
    ({"equal": "token"}, "equal='token' is unknown. Known: seconds, selected_tokens"),
    *(
        ({"equal": "seconds", "seconds": amount}, "needs the common amount, seconds: N")
        for amount in (None, -1.0, 0, math.inf, math.nan)
    ),
    ({"seconds": 5}, "seconds is set but equal is steps"),
    ({"workers": 0}, "must be at least 1"),
    ({"metric": "mean"}, "metric='mean' is unknown"),
    ({"random_control": "maybe"}, "must be true or false"),
    (
        {
            **{"equal": "seconds", "seconds": 5},
            "config": {"lr_scheduler_type": "cosine", "max_steps": 9},
        },
        "would differ between arms",
    ),
]


@pytest.mark.parametrize(("keys", "message"), SLIPS, ids=[str(keys) for keys, _ in SLIPS])
def test_bad_input_is_one_clear_message(keys, message):
    with pytest.raises(ConfigError, match=message):
        arms_of(**keys)


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_not_a_mapping(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        load_study_file(path)
    with pytest.raises(ConfigError, match="cannot read the study"):
        load_study_file(tmp_path / "none.yaml")


def test_update_norm_is_a_setting():
    keys = {"equal": "update_norm", "update_norm": 0.01}
    study = parse_study_file(GOOD | keys)
    base = base_config(study)
    assert base["match_update_norm"] == 0.01 and len(expand(study, base)) == 3


def test_equal_tokens_and_seconds_run_until_they_are_reached():
    study = parse_study_file(GOOD | {"equal": "selected_tokens", "selected_tokens": 500})
    assert base_config(study)["max_steps"] > 10**6


def test_the_list_of_arms_refuses_an_unknown_lab(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text("lab: dialekt\narms: [{selector: tip, budget: 0.1}]\nseeds: [0]\n")
    assert cli.main(["compare", str(path), "--list"]) == 2
    assert "no lab is called 'dialekt'. Did you mean 'dialect'?" in capsys.readouterr().err
