"""Lengths of prompts without transformers, for `taopd plan`. Oracle: transformers."""

import pandas as pd
import pytest

from taopd.models.plain_prompts import OTHER_COLUMNS, longest_prompt
from taopd.models.prompt_rows import COLUMNS, MEDIA
from taopd.models.prompts import encode_prompts, load_prompts, load_tokenizer
from taopd.models.teacher_prompts import COLUMN as TEACHER_PROMPT
from tests.conftest import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}\n  <bos> {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %} w1 w2{% endif %} {{ bos_token }}"
)
CHATS = [[{"role": "user", "content": f"3 + 4 {'w3 ' * n}="}] for n in (1, 5, 2)]


@pytest.mark.parametrize("kind", ["text", "chat", "split", "more"])
def test_the_longest_prompt_is_that_of_transformers(kind, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["1 + 2 =", "w1 w2 w3 1 + 2 =", "w1 w2 w3 w4 w5 w6 2 ="]
    prompts = CHATS if kind == "chat" else texts
    frame = pd.DataFrame({"prompt": prompts})
    if kind == "split":
        frame["split"] = ["train", "train", "test"]
    if kind == "more":  # as the prompts of `make real` have a solution
        frame["solution"], frame["level"] = "text", 3
    frame.to_parquet(tmp_path / "p.parquet")
    found = longest_prompt(tmp_path / "model", tmp_path / "p.parquet", "train", most=2000)
    rows = load_prompts(str(tmp_path / "p.parquet"), split="train")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert found == max(map(len, encode_prompts(loaded, list(rows))))


def test_every_column_that_makes_a_prompt_is_left_to_transformers():
    assert {*COLUMNS, *MEDIA, TEACHER_PROMPT} - {"prompt"} == OTHER_COLUMNS


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        ({"prompt": ["a", ""]}, None),
        ({"prompt": ["a"], "tools": ["[]"]}, None),
        ({"prompt": ["a"], "teacher_prompt": ["b"]}, None),
        ({"prompt": [[{"role": "assistant", "content": "a"}]]}, TEMPLATE),
        ({"prompt": CHATS[:1]}, None),
        ({"prompt": CHATS[:1]}, "{{ strftime_now('%Y') }}"),
        ({"prompt": CHATS[:1]}, "{{ raise_exception('no') }}"),
    ],
)
def test_what_is_not_certain_is_left_to_transformers(rows, template, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    assert longest_prompt(tmp_path / "model", tmp_path / "p.parquet", "train", most=9) is None
