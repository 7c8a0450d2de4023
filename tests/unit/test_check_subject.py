"""What `taopd check` looks at is what a run would read: prompts with their tools, the files of a model."""

import shutil

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from taopd.preflight.remote_teacher import check_tokens
from taopd.preflight.subject import Subject
from taopd.preflight.tokenizer_checks import check_chat_template
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
        path = write_config(micro_lab, tmp_path, **here | settings)
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
