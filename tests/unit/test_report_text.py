"""Readable, visible, inert text. Oracles: the standard library's unicodedata, json and html parsers."""

import json
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taopd.report.pack import _described
from taopd.report.rollouts import Rollout
from taopd.report.text import (
    embed,
    escape,
    readable,
    shortened,
    token_class,
    tokenizer_kind,
    visible,
)

ANY_TEXT = st.text(st.characters(), max_size=60)


@given(ANY_TEXT)
def test_visible_leaves_nothing_that_hides_or_reorders(text):
    shown = visible(text)
    for character in shown.replace("\n", "").replace("\t", ""):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_visible_leaves_plain_text_alone(text):
    assert visible(text) == text


@given(ANY_TEXT)
def test_escaped_text_is_one_piece_of_text(text):
    found = []

    class Reader(HTMLParser):
        def handle_data(self, data):
            found.append(data)

        def handle_starttag(self, tag, attrs):
            assert tag == "p" and attrs == [("title", visible(text))]

    reader = Reader(convert_charrefs=True)
    reader.feed(f'<p title="{escape(text)}">{escape(text)}</p>')
    reader.close()
    assert "".join(found) == visible(text)


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner)))
def test_embedded_json_is_the_same_and_cannot_leave_its_element(value):
    text = embed(value)
    assert json.loads(text) == value
    assert text.isascii() and not set(text) & set("<>&")


def test_byte_level_tokens_round_trip_through_the_published_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in (" the", "é", "数学", "x = 1", "🙂"):
        (token, _), *rest = split.pre_tokenize_str(text)
        assert not rest and readable(token, "bytes") == visible(text)
    half = split.pre_tokenize_str("数")[0][0][:2]
    assert readable(half, "bytes") == "⟨E6 95⟩"
    assert readable("<|im_end|>", "bytes") == "<|im_end|>"


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (["a", "Ġb"], "bytes"),
        (["▁a", "b"], "sentencepiece"),
        (["<0x0A>"], "sentencepiece"),
        (["a"], "words"),
    ],
)
def test_kind_of_a_vocabulary(tokens, kind):
    assert tokenizer_kind(tokens) == kind


def test_white_space_long_and_missing_tokens_are_shown():
    assert readable("Ċ", "bytes") == "⏎\n"
    assert readable("<0x09>", "sentencepiece") == "⇥\t"
    assert readable("", "bytes") == "⟨empty⟩" and readable(None, "bytes") == "⟨no such id⟩"
    assert len(readable("x" * 100_000, "bytes")) < 220
    assert visible("\u0301" * 9).startswith("◌\u0301") and visible("\u0301" * 9).count("⟨") == 5


def test_classes_of_tokens():
    found = [token_class(text) for text in ("12", " the", "s3 ", "<eos>", "+", ",", "⏎\n", "a,b")]
    expected = [
        "number",
        "word",
        "word with digits",
        "special",
        "operator",
        "punctuation",
        "white space",
    ]
    assert found == [*expected, "mixed"]


def test_names_that_differ_at_their_end_stay_apart_when_they_are_cut():
    """Two arms of one selector had the same label in the pictures of a study."""
    names = [f"soft_or(entropy, dial(beta=0.5)), budget 0.05, {m}" for m in ("reach", "published")]
    for most in (17, 22, 25, 38):
        cut = [shortened(name, most) for name in names]
        assert len(set(cut)) == 2 and all(len(name) == most for name in cut)
    assert shortened("teachability", 12) == "teachability"


def test_what_a_rollout_lacks_is_unknown_and_not_zero():
    """A bank selects nothing: its page said "0.0 % kept, Dᴵ 0" of every completion."""
    line = {"disagreement": [0.2, 0.4]}
    common = {"run": "a", "step": 0, "pieces": ["x", "y"], "correct": None, "kind": "words"}
    facts = _described(Rollout(line=line, **common), 0)
    assert (facts["kept"], facts["meanD"], facts["meanI"]) == (None, 0.3, None)
    facts = _described(
        Rollout(line=line | {"kept": [False, False], "incompatible": [0, 0]}, **common), 0
    )
    assert (facts["kept"], facts["meanI"]) == (0.0, 0.0)
