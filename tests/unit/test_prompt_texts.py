"""Prompts that are longer than their texts, and texts that are none."""

import pytest

from taopd.errors import DataError
from taopd.models.prompt_lengths import check_prompt_lengths
from taopd.models.prompt_rows import read_prompt, render
from taopd.models.teacher_prompts import TeacherPrompts
from tests.conftest import make_tokenizer


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_a_thought_that_the_template_writes_counts_in_the_length(key):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.{key} or '' }}}} {{{{ m.content }}}} {{% endfor %}}"
    )
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", key: "w1 " * 2000},
        {"role": "user", "content": "3"},
    ]
    rows = [{"prompt": turns[:1]}, {"prompt": turns}]
    with pytest.raises(DataError, match="prompt of row 1 has 2003 tokens"):
        check_prompt_lengths(rows, tokenizer, context_length=1000, max_completion_length=8)


@pytest.mark.parametrize("prompt", ["a \ud83d", [{"role": "user", "content": "\ude00 b"}]])
def test_half_of_a_surrogate_pair_is_no_text(prompt):
    with pytest.raises(DataError, match=r"the prompt of row 3 holds half of .*, '\\u(d83d|de00)'"):
        read_prompt({"prompt": prompt}, "row 3")
    row = {"prompt": "1", "teacher_prompt": prompt}
    with pytest.raises(DataError, match="the teacher_prompt of row 3 holds half"):
        TeacherPrompts().of(row, read_prompt("1", "row 3"), "row 3")
    assert read_prompt("whole \U0001f600", "row 3").content == "whole \U0001f600"


def test_nor_is_it_in_what_a_template_writes():
    """Of the tokenizer's template: tools, calls and options; of the teacher's prompt: columns."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0].function.description if tools }}{{ date }}"
        "{% for m in messages %}{{ m.content }}"
        "{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    )
    half = "\ud83d"
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": half}}]}
    turns = [{"role": "user", "content": "1"}]
    for row in (
        {"prompt": turns, "tools": [{"type": "function", "function": {"description": half}}]},
        {"prompt": turns, "chat_template_kwargs": {"date": half}},
        {"prompt": [*turns, call, {"role": "tool", "content": "2"}]},
    ):
        with pytest.raises(DataError, match=r"the chat template makes of a row holds half of"):
            render(tokenizer, read_prompt(row, "row 3"))
    with pytest.raises(DataError, match="the column 'hint' of row 3 holds half of"):
        TeacherPrompts("{prompt} {hint}").of({"hint": half}, read_prompt("1", "row 3"), "row 3")
