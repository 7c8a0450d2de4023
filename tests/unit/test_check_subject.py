"""What `taopd check` looks at is what a run would read: prompts with their tools, the files of a model."""

import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from taopd.preflight.remote_teacher import check_tokens
from taopd.preflight.subject import Subject
from taopd.preflight.tokenizer_checks import check_chat_template
from taopd.trainer.build.teacher_connection import vocabularies
from taopd.trainer.settings_file import parse_settings
from tests.conftest import write_config

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ASKED = Dataset.from_list([{"prompt": [{"role": "user", "content": "w1 w2"}]}])


@pytest.fixture
def subject(micro_lab, tmp_path):
    """Makes what is checked for a run over the micro models; their folders can be written to."""

    def make(**settings):
        names = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"}
        for folder in names.values():
            if not (tmp_path / folder).exists():
                shutil.copytree(micro_lab.root / folder, tmp_path / folder)
        here = {setting: str(tmp_path / folder) for setting, folder in names.items()}
        path = write_config(micro_lab, tmp_path, loss="sampled_reverse_kl", **here | settings)
        return Subject(settings=parse_settings(str(path), []))

    return make


@pytest.fixture
def with_templates(subject, tmp_path):
    """The same with prompts of messages, and templates that differ where there are tools."""

    def make(**settings):
        found = subject(**settings)
        (tmp_path / "student/chat_template.jinja").write_text(TEMPLATE)
        (tmp_path / "teacher/chat_template.jinja").write_text(
            "{% if tools %}w3{% endif %}" + TEMPLATE
        )
        found.prompts = ASKED
        return found

    return make


@pytest.mark.parametrize("tools", [None, "tests.tool_functions:TOOLS"])
def test_templates_are_compared_with_the_tools_of_the_run(with_templates, tools):
    found = check_chat_template(with_templates(tools=tools))
    assert found.level == ("pass" if tools is None else "warn")


@pytest.mark.parametrize("tools", [None, "tests.tool_functions:TOOLS"])
def test_a_server_is_asked_about_prompts_with_the_tools_of_the_run(with_templates, tools, tmp_path):
    found = with_templates(tools=tools)
    asked = []

    class Server:
        def tokenize(self, text):
            asked.append(text)

    found.server = Server()
    template = (tmp_path / "teacher/chat_template.jinja").read_text()
    (tmp_path / "student/chat_template.jinja").write_text(template)
    found.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    check_tokens(found)
    assert asked == ["w1 w2" if tools is None else "w3w1 w2"]


COMMIT = "0123abcd" * 5


def served(subject, name, **settings):
    """The check of a run whose teacher is behind a server; its files have this name."""
    return subject(
        teacher_url="http://127.0.0.1:9", teacher_model_name_or_path=str(name), **settings
    )


def test_a_teacher_without_a_generation_config_stops_as_its_config_says(subject, tmp_path):
    """As it is loaded: transformers makes one of the config."""
    found = served(subject, tmp_path / "teacher")
    (tmp_path / "teacher/generation_config.json").unlink()
    truth = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").generation_config
    assert found.generation_configs[1].eos_token_id == truth.eos_token_id == 2


def test_a_teacher_that_is_an_adapter_has_the_config_of_its_base(subject, tmp_path):
    found = served(subject, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    assert found.configs[1].hidden_size == 32
    assert found.generation_configs[1].eos_token_id == 2
    student = SimpleNamespace(config=found.student_config)
    assert vocabularies(found.settings.training, student, found.tokenizer) == (40, 40)


def test_a_config_is_read_of_the_revision_that_the_run_names(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = served(subject, "somebody/model", teacher_model_revision="tuned")
    root = tmp_path / "hub/models--somebody--model"
    shutil.copytree(tmp_path / "teacher", root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs/tuned").write_text(COMMIT)
    assert found.configs[1].hidden_size == 32
    assert found.generation_configs[1].eos_token_id == 2
