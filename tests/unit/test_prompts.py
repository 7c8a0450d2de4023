"""Prompts of every kind, and the faults that show in their tokens.

Oracles: the tokens written down by hand, and transformers' own chat template.
"""

import json
import logging
from types import SimpleNamespace

import datasets
import pytest
from tokenizers import processors

from taopd.errors import DataError
from taopd.models.prompt_faults import faults_of_ends, prompt_faults
from taopd.models.prompt_lengths import check_prompt_lengths
from taopd.models.prompt_rows import Prompt, read_prompt, render
from taopd.models.prompts import encode_prompts, load_prompts
from taopd.preflight.prompt_checks import check_prompts
from tests.conftest import WORDS, make_tokenizer

CHAT = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }} {% endif %}" + CHAT
CALL = {"type": "function", "function": {"name": "w1", "arguments": {"x": 1}}}


@pytest.fixture
def tokenizer():
    """A chat tokenizer; `<turn>` and `<end>` mark turns, `<end>` ends the text."""
    made = make_tokenizer([*WORDS, "user", "assistant", "system", "tool", "None"])
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    made.eos_token, made.chat_template = "<end>", CHAT
    return made


def user(content):
    return {"role": "user", "content": content}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(tokenizer, row):
    return tokenizer.decode(encode_prompts(tokenizer, [row])[0])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "1 + 1"}, "1 + 1"),
        ({"prompt": [user("1 + 1")], "image": None}, "<turn> user 1 + 1 <end> <turn> assistant"),
        ({"prompt": [user("1")], "images": []}, "<turn> user 1 <end> <turn> assistant"),
        ({"prompt": [user("1")], "images": [None]}, "<turn> user 1 <end> <turn> assistant"),
        (
            {"prompt": [user([{"type": "text", "text": "1 +", "image_url": None}, " 1"])]},
            "<turn> user 1 + 1 <end> <turn> assistant",
        ),
        (
            {"prompt": [user([{"type": "input_text", "text": "1"}]) | {"tool_calls": None}]},
            "<turn> user 1 <end> <turn> assistant",
        ),
        (
            {"prompt": [user("1") | {"role": "User"}]},
            "<turn> user 1 <end> <turn> assistant",
        ),
        (
            {"prompt": [{"role": "system", "content": ""}, user("1")]},
            "<turn> system <end> <turn> user 1 <end> <turn> assistant",
        ),
        (
            {
                "prompt": [
                    user("1"),
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": "2"},
                ]
            },
            "<turn> user 1 <end> <turn> assistant <end> <turn> tool 2 <end> <turn> assistant",
        ),
        (
            {"messages": [user("1"), {"role": "assistant", "content": "2"}]},
            "<turn> user 1 <end> <turn> assistant",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "w1"},
                    {"from": "human", "value": "1"},
                    {"from": "gpt", "value": "2"},
                    {"from": "human", "value": "3"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            "<turn> system w1 <end> <turn> user 1 <end> <turn> assistant 2 <end> "
            "<turn> user 3 <end> <turn> assistant",
        ),
    ],
)
def test_a_row_of_any_kind_is_read_as_its_text(tokenizer, row, text):
    assert text_of(tokenizer, row) == text


def test_text_and_messages_may_be_mixed(tokenizer):
    rows = [[user("1")], "2 + 2", [user("3")]]
    assert encode_prompts(tokenizer, rows) == [encode_prompts(tokenizer, [row])[0] for row in rows]


def test_messages_are_encoded_as_by_transformers(tokenizer):
    messages = [user("1"), {"role": "assistant", "content": "2"}, user("3 + 4")]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encode_prompts(tokenizer, [messages]) == [expected]


@pytest.mark.parametrize("template", ["{{ m['role'] + m['content'] }}", "{{ m['content'] }}"])
def test_null_content_is_neither_printed_nor_an_error(tokenizer, template):
    messages = [user("1"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, user("2")]
    template = "{% for m in messages %}" + template + "{% endfor %}"
    found = render(tokenizer, read_prompt(messages, "row 0"), template=template)
    assert found in ("user1assistantuser2", "12")


@pytest.mark.parametrize("as_text", [False, True])
def test_every_row_has_its_own_tools_and_options(tokenizer, as_text):
    tokenizer.chat_template = "{{ tools | tojson if tools else '-' }} {{ mode }}"
    tools = [{"type": "function", "function": {"name": "w1", "parameters": {"x": None}}}]
    row = {"prompt": [user("1")], "tools": tools, "chat_template_kwargs": {"mode": "a", "b": None}}
    if as_text:
        row |= {name: json.dumps(row[name]) for name in ("tools", "chat_template_kwargs")}
    kept = json.dumps([{"type": "function", "function": {"name": "w1", "parameters": {}}}])
    found = render(tokenizer, read_prompt(row, "row 0"), options={"mode": "b"})
    assert (json.loads(found[:-2]), found[-1]) == (json.loads(kept), "a")
    assert render(tokenizer, read_prompt([user("1")], "row 1"), options={"mode": "b"}) == "- b"


@pytest.mark.parametrize("none", [None, "", " ", "null", "{}"])
@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_a_row_may_have_no_tools_and_no_options(column, none):
    """Null in a table, and as text nothing at all."""
    found = read_prompt({"prompt": "1", column: none}, "row 0")
    assert (found.tools, found.options) == (None, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [user("1")], "images": ["x.png"]}, "row 0 has images: taopd trains on text"),
        ({"prompt": [user("1")], "image": {"bytes": b"x"}}, "row 0 has image:"),
        ({"prompt": [user([{"type": "image_url", "image_url": "x"}])]}, "with 'image_url'"),
        ({"prompt": [user([{"type": "image"}, {"type": "text", "text": "1"}])]}, "with 'image'"),
        ({"prompt": [user("1"), {"role": "assistant", "content": "2"}]}, "ends with an assistant"),
        ({"prompt": [{"role": "system", "content": "1"}, user(" ")]}, "row 0 is empty"),
        ({"prompt": [{"role": "system", "content": "1"}]}, "row 0 has a system message alone"),
        ({"prompt": [{"content": "1"}]}, "without a role"),
        ({"prompt": [user(7)]}, "content of a message is int"),
        ({"prompt": ["1"]}, "a message is str"),
        ({"messages": [{"role": "assistant", "content": "1"}]}, "has no user turn"),
        ({"prompt": "1", "tools": "{"}, "tools of row 0: not JSON"),
        (
            {"prompt": "1", "tools": '[{"a": 1, "a": 2}]'},
            "tools of row 0: the key 'a' stands twice",
        ),
        ({"prompt": "1", "chat_template_kwargs": [1]}, "must be a mapping"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        encode_prompts(tokenizer, [row])


def test_conversations_are_loaded_up_to_the_last_user_turn(tmp_path, tokenizer, caplog):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    rows = [
        {"messages": [user("1"), call, {"role": "tool", "content": "5"}, reply]},
        {"messages": [user([{"type": "text", "text": "3"}]), reply]},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="taopd"):
        found = load_prompts(path, require_answer=True)
    assert found["answer"][:] == ["2", "2"]
    assert [text_of(tokenizer, row) for row in found] == [
        f"<turn> user {number} <end> <turn> assistant" for number in (1, 3)
    ]
    assert (
        "no 'prompt' column: a prompt is what 'messages' holds up to the last user" in caplog.text
    )
    assert "answer" not in load_prompts(path).column_names


def test_the_advice_never_names_a_column_of_messages(tmp_path):
    turns = [user("1"), {"role": "assistant", "content": "2"}]
    path = write(tmp_path / "x.jsonl", [{"dialog": turns, "question": "1"}])
    with pytest.raises(DataError, match=r"rename_column\('question'.*a column 'messages'"):
        load_prompts(path)


def test_the_advice_never_names_a_column_that_is_in_use(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "1"}])
    with pytest.raises(DataError, match="no 'answer' column, only prompt; add one with") as found:
        load_prompts(path, require_answer=True)
    assert "rename_column" not in str(found.value)
    path = write(tmp_path / "y.jsonl", [{"prompt": "1", "solution": "2"}])
    with pytest.raises(DataError, match=r"rename_column\('solution', 'answer'\)"):
        load_prompts(path, require_answer=True)
    path = write(tmp_path / "z.jsonl", [{"answer": "1", "question": "2"}])
    with pytest.raises(DataError, match=r"rename_column\('question', 'prompt'\)"):
        load_prompts(path)


def test_a_table_without_rows_says_so(tmp_path):
    empty = datasets.Dataset.from_dict(
        {"prompt": []}, datasets.Features(prompt=datasets.Value("string"))
    )
    empty.to_parquet(tmp_path / "f" / "x.parquet")
    for path in (tmp_path / "f" / "x.parquet", tmp_path / "f"):
        with pytest.raises(DataError, match="has no rows"):
            load_prompts(path)


def faults(tokenizer, rows, **more):
    return [(fault.certain, fault.text) for fault in prompt_faults(tokenizer, rows, **more)]


def test_good_prompts_have_no_fault(tokenizer):
    rows = [{"prompt": [user(f"{n} + 1")], "answer": str(n + 1)} for n in range(4)]
    rendered = [{"prompt": f"<turn> user {n} <end> <turn> assistant"} for n in range(4)]
    thinks = [{"prompt": row["prompt"] + " <think>\n"} for row in rendered]
    plain = [{"prompt": f"{n} + 1 =", "answer": "2"} for n in range(4)]
    for good in (rows, rendered, thinks, plain):
        assert faults(tokenizer, good, stop_ids=[2]) == []


def test_messages_that_were_written_as_text_are_told(tokenizer):
    turns = [user("1 + 1")]
    for text in (json.dumps(turns), str(turns), json.dumps(turns, indent=1)):
        (fault,) = faults(tokenizer, [{"prompt": text}, {"prompt": turns}, {"prompt": "[1] + 1 ="}])
        assert not fault[0] and fault[1].startswith("1 of 3 prompts are messages as text (")
        # A table of plain text has no lists, so that a teacher's prompts are the same case.
        (fault,) = faults_of_ends(tokenizer, [Prompt(content=text)])
        assert "store them as lists of messages" in fault.text


def begins_with(token):
    """A tokenizer that writes `token` before every text."""

    def change(tokenizer):
        pair = [(token, tokenizer.convert_tokens_to_ids(token))]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=pair
        )

    return change


def ends_with_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )


def no_header(tokenizer):
    tokenizer.chat_template = CHAT.partition("{% if add")[0]


LONG = "w1 w2 w3 w4 w5 w6 w7 w8"


@pytest.mark.parametrize(
    ("change", "rows", "certain", "message"),
    [
        (
            begins_with("<bos>"),
            ["<bos> 1", "<bos> 2"],
            True,
            "2 of 2 prompts begin with <bos> (BOS) twice",
        ),
        (ends_with_eos, ["1", "2"], True, "but with '1 <end>'"),
        (no_header, [[user("1")], [user("2")]], True, "no header of the assistant follows"),
        (None, ["<turn> user 1 <end>", [user("2")]], True, "1 of 2 prompts do not end where"),
        (None, ["<turn> user 1", "<turn> user 2"], True, "do not end where"),
        (None, ["<turn> user 1 <end> <turn> assistant 2 <end>"] * 2, True, "do not end where"),
        (
            None,
            ["<turn> assistant 1", "<turn> assistant 2"],
            True,
            "end inside the assistant's turn",
        ),
        (None, ["<turn> assistant w1", "<turn> assistant w1"], False, "after 'w1'"),
        (None, [{"prompt": f"1 = {n}", "answer": n} for n in range(3)], False, "'answer' column"),
        (
            None,
            [{"prompt": f"{LONG} 1 =", "completion": [user(LONG)]}] * 2,
            False,
            "'completion' column",
        ),
        (None, [{"prompt": [user("1")], "tools": [CALL]}] * 2, False, "The tools of 2 of 2"),
        (None, [{"prompt": "1", "tools": [CALL]}] * 2, False, "The tools of 2 of 2"),
        (
            None,
            [{"prompt": [user("1")], "chat_template_kwargs": {"thinking": False}}] * 2,
            False,
            "The thinking of 2 of 2",
        ),
        (
            None,
            [[user("1"), {"role": "assistant", "tool_calls": [CALL]}, user("2")]] * 2,
            False,
            "The tool_calls of their messages of 2 of 2",
        ),
    ],
)
def test_faults_that_show_in_the_tokens(tokenizer, change, rows, certain, message):
    if change is not None:
        change(tokenizer)
    ((found, text),) = faults(tokenizer, rows)
    assert message in text
    assert found == certain
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    verdict = checked(tokenizer, None, rows)
    assert verdict.level == ("fail" if certain else "warn")


def checked(student, teacher, rows):
    """The item of the check; None: the teacher's files are not named."""
    return check_prompts(
        SimpleNamespace(
            tokenizer=student,
            tokenizers=(student, teacher),
            names_teacher=teacher is not None,
            some_rows=lambda count: rows,
            shown={},
            student_generation_config=SimpleNamespace(eos_token_id=None),
        )
    )


def test_tools_that_the_template_shows_are_no_fault(tokenizer):
    tokenizer.chat_template = TOOLS
    assert faults(tokenizer, [{"prompt": [user("1")], "tools": [CALL]}]) == []


def test_plain_text_is_named_where_both_models_chat(tokenizer):
    rows = [{"prompt": "1 + 1 ="}, {"prompt": "2 + 2 ="}]
    verdict = checked(tokenizer, tokenizer, rows)
    assert (verdict.level, verdict.figures["end"]) == ("warn", "1 + 1 =")
    assert "2 of 2 prompts are plain text without turns" in verdict.advice
    base = make_tokenizer()
    assert checked(tokenizer, base, rows).level == "pass"
    assert checked(base, tokenizer, rows).level == "pass"


def test_a_prompt_of_which_the_tokenizer_keeps_nothing_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # Without an unknown token and without bytes what is not in the vocabulary is dropped.
    backend = Tokenizer(models.BPE({"<eos>": 0, "a": 1}, []))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>"
    )
    assert encode_prompts(tokenizer, ["a\u2603a"]) == [[1, 1]]
    with pytest.raises(DataError, match="prompt of row 1 has no tokens"):
        encode_prompts(tokenizer, ["a", "\u2603"])
    # Of a set only the rows are encoded that may be too long.
    with pytest.raises(DataError, match="prompt of row 2 of the set has no tokens"):
        check_prompt_lengths(
            ["a", "a", "\u2603" * 99],
            tokenizer,
            context_length=80,
            max_completion_length=4,
            where="the set",
        )


def test_a_row_that_the_template_fails_on_is_named_by_its_place(tokenizer):
    tokenizer.chat_template = "{% if messages[0].content == '2' %}{{ 1 // 0 }}{% endif %}1"
    rows = [{"prompt": [user(text)], "tools": [CALL]} for text in "112"]
    lengths = {"context_length": 80, "max_completion_length": 4}
    with pytest.raises(DataError, match="template cannot be used for row 2: ZeroDivisionError"):
        check_prompt_lengths(rows, tokenizer, **lengths)
