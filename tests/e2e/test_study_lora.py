"""Arms of a study with settings of `trl.ModelConfig`: the adapter that trains, how weights are loaded."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_demo import MICRO
from transformers import AutoModelForCausalLM, TrainingArguments

from taopd.errors import ConfigError
from taopd.experiments.arm_student import load_student, number_format, split_settings
from taopd.experiments.lab.build import build_lab
from taopd.experiments.study.file import parse_study_file
from taopd.experiments.study.run import plan_study, run_study
from taopd.trainer.settings_file import parse_settings

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TRAINING = {"max_steps": 2, "budget": 0.25, "learning_rate": 1e-3, "method": "reach"}
STUDY = {
    "lab": "dialect",
    "lab_sizes": MICRO,
    "config": TRAINING | LORA,
    "arms": [{"name": "adapter"}, {"name": "whole", "use_peft": False}],
    "seeds": [0],
    "evaluate_every": 2,
    "random_control": False,
    "full_control": False,
    "save_models": True,
    "workers": 1,
}


pytestmark = pytest.mark.usefixtures("lab_cache")


@pytest.mark.slow
def test_an_arm_trains_the_adapter_that_its_settings_name(tmp_path, forked_arms):
    plan = plan_study(parse_study_file(STUDY))
    run_study(plan, output=tmp_path / "study", num_workers=1)
    arms = tmp_path / "study" / "arms"
    written = json.loads((arms / "adapter-seed0/model/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    assert (arms / "whole-seed0/model/model.safetensors").exists()

    trained = load_file(arms / "adapter-seed0/model/adapter_model.safetensors")
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    results = json.loads((arms / "adapter-seed0/results.json").read_text())
    assert results["steps"] == 2 and [step for step, _ in results["accuracy_curve"]] == [0, 2]


def test_weights_of_an_arm_are_loaded_as_its_settings_say(tmp_path):
    lab = build_lab("dialect", **MICRO)
    settings = {"dtype": "bfloat16", "attn_implementation": "eager", "budget": 0.5}
    training, weights = split_settings(settings)
    student = load_student(str(lab.student), weights)
    assert student.dtype is torch.bfloat16 and student.config._attn_implementation == "eager"
    # What the results of the arm say.
    assert number_format(student, TrainingArguments(use_cpu=True, bf16=False)) == "bfloat16"
    # The teacher is loaded likewise, unless its own keywords say otherwise.
    shared = {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert training == {"budget": 0.5, "teacher_model_init_kwargs": shared}
    own = {"teacher_model_init_kwargs": {"dtype": "float32"}}
    assert split_settings(settings | own)[0]["teacher_model_init_kwargs"]["dtype"] == "float32"
    assert split_settings({"budget": 0.5})[0] == {"budget": 0.5}


def test_an_adapter_that_nobody_asked_for_is_no_silent_run_of_all_weights(tmp_path):
    words = "lora_r: without use_peft: true no adapter trains, but all weights"
    with pytest.raises(ConfigError, match=words):
        split_settings({"budget": 0.5, "lora_r": 4})
    assert split_settings({"use_peft": False, "lora_r": 4})[1].use_peft is False
    path = tmp_path / "run.yaml"
    path.write_text("lab: dialect\noutput_dir: runs/x\nuse_cpu: true\nbf16: false\nlora_r: 4\n")
    with pytest.raises(ConfigError, match=words):
        parse_settings(str(path), [], lab=lambda variant: {})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"lora_r": 0}, "lora_r=0"),
        ({"use_peft": "yes"}, "use_peft='yes': must be true or false"),
        ({"lora_alpha": [8]}, "lora_alpha=.*must be a whole number"),
        ({"lora_rank": 4}, "unknown key 'lora_rank'"),
        ({"use_peft": None}, "use_peft=None: must be true or false"),
        (
            {"dtype": "bfloat17"},
            "dtype='bfloat17': must be one of auto, bfloat16, float16, float32",
        ),
        ({"trust_remote_code": True}, "trust_remote_code: code from a model"),
    ],
)
def test_a_wrong_setting_of_the_adapter_is_refused_by_name(setting, words):
    with pytest.raises(ConfigError, match=words):
        plan_study(parse_study_file(STUDY | {"config": TRAINING | LORA | setting}))


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_an_adapter_that_the_students_own_cannot_be_saved_with_is_refused_before_any_arm(
    setting, tmp_path
):
    lab = build_lab("dialect", **MICRO)
    plain = AutoModelForCausalLM.from_pretrained(lab.student)
    get_peft_model(plain, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    for file in lab.student.glob("tokenizer*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    own = {
        "num_test_prompts": 8,
        "student": str(tmp_path / "adapter"),
        "teacher": str(lab.teacher),
        "prompts": str(lab.prompts),
    }
    study = {key: value for key, value in STUDY.items() if key not in ("lab", "lab_sizes")} | own
    config = TRAINING | {"max_completion_length": 9}
    arms = [{"name": "on"}, {"name": "new", "use_peft": True, **setting}]
    with pytest.raises(ConfigError, match="arm 'new': the student is an adapter"):
        plan_study(parse_study_file(study | {"config": config, "arms": arms}))
    del arms[1][next(iter(setting))]
    assert len(plan_study(parse_study_file(study | {"config": config, "arms": arms})).arms) == 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({**LORA, "lora_target_modules": ["nope"]}, "Target modules .*nope.* not found"),
        ({"attn_implementation": "fast"}, 'attn_implementation="fast"'),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"load_in_4bit": True, **LORA}, "load_in_4bit needs the package bitsandbytes"),
        ({"teacher_quantization": "8bit"}, "teacher_quantization needs the package bitsandbytes"),
        ({"teacher_model_init_kwargs": {"dtype": "float99"}}, "teacher: .*float99"),
        ({"model_init_kwargs": {"dtype": "float99"}}, "student: .*float99"),
        ({"optim": "lomo"}, "lomo"),
        ({"optim_args": "amsgrad=1"}, "does not read 'amsgrad'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr'"),
        ({"num_generations": 3}, "num_generations=3 does not divide"),
        ({"report_to": "clearml"}, "report_to='clearml': .*installed"),
        ({"report_to": "flyte"}, "report_to='flyte': .*installed"),
        ({"report_to": "kubeflow"}, "report_to='kubeflow': "),
        ({"report_to": ["none", "wandbb"]}, "wandbb is not supported"),
        ({"report_to": ["none", "tensorboard"]}, r"report_to=.*\]: none is not supported; take"),
    ],
)
def test_what_an_arm_would_stumble_over_is_refused_before_the_first_one(setting, words):
    """Its models are made from their configs alone; it was told after hours of the arms before it."""
    arms = [{"selector": "full"}, {"name": "late", "selector": "full", **setting}]
    with pytest.raises(ConfigError, match=f"^arm 'late': .*{words}"):
        plan_study(parse_study_file(STUDY | {"config": TRAINING, "arms": arms}))


def test_an_arms_own_options_of_loading_reach_its_student():
    lab = build_lab("dialect", **MICRO)
    weights = split_settings({"dtype": "float32"})[1]
    assert load_student(str(lab.student), weights).dtype == torch.float32
    assert load_student(str(lab.student), weights, {"dtype": "bfloat16"}).dtype == torch.bfloat16
