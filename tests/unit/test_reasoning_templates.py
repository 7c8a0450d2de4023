"""Templates of reasoning models before training: thoughts, flags, default system prompts, refused roles.

Oracle: the templates, written here, of which it is known how two of them differ.
"""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from taopd.errors import DataError
from taopd.models.prompt_faults import prompt_faults
from taopd.preflight.tokenizer_checks import check_chat_template, check_thinking
from tests.conftest import WORDS, make_tokenizer

MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TURNS = "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
FLAG = "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}"
PLAIN = TURNS + OPENED
HYBRID = PLAIN + FLAG
REASONING = PLAIN + "{% if add_generation_prompt %}<think> {% endif %}"
SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|> system w1 <|im_end|> {% endif %}" + PLAIN
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
)
QUESTION = [{"role": "user", "content": "1 + 2 ="}]
RENDERED = "<|im_start|> user 1 + 2 = <|im_end|> <|im_start|> assistant "


def tokenizer(template):
    made = make_tokenizer((*WORDS[:4], *MARKS, "user", "assistant", "system", *WORDS[4:]))
    made.add_tokens(list(MARKS))
    made.chat_template = template
    return made


def levels(check, student, teacher, prompt=QUESTION, **options):
    """Level and advice of an item for a pair of templates."""
    rows = Dataset.from_list([{"prompt": prompt}])
    subject = SimpleNamespace(
        tokenizers=(tokenizer(student), tokenizer(teacher)),
        prompts=rows,
        some_rows=lambda count: list(rows),
        shown={"options": options},
    )
    verdict = check(subject)
    return verdict.level, verdict.advice


@pytest.mark.parametrize(
    ("template", "text", "certain"),
    [
        (REASONING, RENDERED + "<think> ", []),
        (REASONING, RENDERED, []),
        (HYBRID, RENDERED + "<think> </think> ", []),
        (REASONING, RENDERED + "<think> w1 w2", [True]),
        (REASONING, RENDERED + "<think> w1 </think> 3 <|im_end|>", [True]),
        (REASONING, "<|im_start|> user 1 + 2 = <|im_end|>", [True]),
    ],
    ids=["opened", "not opened", "closed", "begun", "ended", "no header"],
)
def test_a_rendered_prompt_may_end_with_an_opened_thought(template, text, certain):
    """Where the marker of a thought is a token of its own it passed for that of another turn."""
    found = prompt_faults(tokenizer(template), [{"prompt": text}])
    assert [fault.certain for fault in found] == certain


@pytest.mark.parametrize(
    ("templates", "options", "level", "told"),
    [
        ((HYBRID, HYBRID), {"enable_thinking": False}, "pass", ""),
        ((HYBRID, PLAIN), {}, "fail", "set chat_template_kwargs: {enable_thinking: false} if"),
        ((HYBRID, PLAIN), {"enable_thinking": False}, "pass", ""),
        ((PLAIN, HYBRID), {}, "fail", "give the student's tokenizer the teacher's template"),
        ((HYBRID, HYBRID), {"enable_thinkng": False}, "fail", "sets enable_thinkng, which the"),
        ((PLAIN, PLAIN), {"date_string": "w3"}, "fail", "sets date_string, which the student's"),
        ((REASONING, PLAIN), {}, "fail", "Only the student's rendered prompt ends inside <think>"),
    ],
)
def test_the_advice_about_flags_is_not_given_once_it_was_taken(templates, options, level, told):
    found, advice = levels(check_thinking, *templates, **options)
    assert found == level and told in advice


def test_options_that_no_prompt_goes_through_are_told():
    found = levels(check_thinking, HYBRID, HYBRID, RENDERED, enable_thinking=False)
    assert found[0] == "warn" and "no effect: no prompt goes through the template" in found[1]
    assert levels(check_thinking, HYBRID, HYBRID, RENDERED) == ("pass", "")


@pytest.mark.parametrize(
    ("templates", "level", "told"),
    [
        ((SYSTEM, PLAIN), "warn", "default system prompt"),
        ((PLAIN, SYSTEM), "warn", "give both the same system message"),
        ((REASONING, PLAIN), "fail", "other control tokens"),
        ((STRICT, SYSTEM), "fail", "other control tokens"),
    ],
)
def test_a_default_system_prompt_is_told_from_another_layout(templates, level, told):
    found, advice = levels(check_chat_template, *templates)
    assert found == level and told in advice
    # The cure: with a system message in the prompts only the others still differ.
    if level == "warn":
        asked = [{"role": "system", "content": "w2"}, *QUESTION]
        assert levels(check_chat_template, *templates, asked)[0] == "pass"


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_the_template_that_refuses_a_role_is_named(owner):
    templates = (STRICT, PLAIN) if owner == "student" else (PLAIN, STRICT)
    asked = [{"role": "system", "content": "w2"}, *QUESTION]
    with pytest.raises(DataError, match=f"for the {owner} the chat template .*no system"):
        levels(check_chat_template, *templates, asked)
