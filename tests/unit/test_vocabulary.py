"""Shared ids. Oracle: vocabularies written by hand, and the published sizes of the Qwen family."""

import logging

import pytest

from taopd.errors import DataError
from taopd.models import tokenizers as vocabulary
from taopd.models.tokenizers import check_same_tokenizer, shared_vocabulary
from tests.conftest import WORDS, make_tokenizer


class Ids:
    """A tokenizer reduced to what is compared."""

    def __init__(self, tokens, added=()):
        items = tokens.items() if isinstance(tokens, dict) else enumerate(tokens)
        self._vocab = {token: index for index, token in items}
        self.added_tokens_decoder = {self._vocab[token]: token for token in added}

    def get_vocab(self):
        return dict(self._vocab)


@pytest.fixture(autouse=True)
def fresh_log(caplog):
    vocabulary._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="taopd")


def test_same_tokenizer_shares_every_id():
    assert check_same_tokenizer(make_tokenizer(), make_tokenizer()) == len(WORDS) == 40


def test_different_tokenizers_name_the_first_differing_token():
    other = list(WORDS)
    other[7], other[30] = "seven", "thirty"
    with pytest.raises(DataError, match="id 7 is '3' for the student, 'seven' for the teacher"):
        check_same_tokenizer(make_tokenizer(), make_tokenizer(other))


def test_added_tokens_at_the_tail_of_one_side_end_the_prefix():
    teacher = make_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert len(teacher) == 42
    assert check_same_tokenizer(make_tokenizer(), teacher) == 40
    assert check_same_tokenizer(teacher, make_tokenizer()) == 40


def test_a_token_missing_in_the_middle_is_an_error():
    with pytest.raises(DataError, match="id 1 is no token for the student, 'b' for the teacher"):
        check_same_tokenizer(Ids({0: "a", 2: "c"}), Ids("abc"))


def test_holes_in_both_stay_inside_and_are_said(caplog):
    assert check_same_tokenizer(Ids({0: "a", 3: "b"}), Ids({0: "a", 3: "b"})) == 4
    assert "2 of the first 4 ids have no token" in caplog.text


@pytest.mark.parametrize(("student", "teacher"), [("", "ab"), ("ab", "")])
def test_empty_tokenizer(student, teacher):
    with pytest.raises(DataError, match="tokenizer is empty"):
        check_same_tokenizer(Ids(student), Ids(teacher))


def test_disjoint_tokenizers():
    with pytest.raises(DataError, match="id 0 is 'a' for the student, no token"):
        check_same_tokenizer(Ids({0: "a"}), Ids({5: "a"}))


def test_renamed_control_tokens_are_an_error_unless_cut(caplog):
    """The case of Qwen2.5 and DeepSeek-R1-Distill-Qwen: one base, other control tokens."""
    student = Ids(
        ["a", "b", "<|endoftext|>", "<|x|>", "<|tool|>"],
        added=["<|endoftext|>", "<|x|>", "<|tool|>"],
    )
    teacher = Ids(["a", "b", "<eos>", "<bos>", "<|tool|>"], added=["<eos>", "<bos>", "<|tool|>"])
    with pytest.raises(DataError, match=r"id 2 is '<\|endoftext\|>' for the student, '<eos>'"):
        check_same_tokenizer(student, teacher)
    assert check_same_tokenizer(student, teacher, cut_renamed_control_tokens=True) == 2
    assert "2 control tokens differ, from id 2" in caplog.text
    text = Ids(["a", "x", "<eos>", "<bos>", "<|tool|>"], added=["<eos>", "<bos>", "<|tool|>"])
    with pytest.raises(DataError, match="id 1 is 'b'"):
        check_same_tokenizer(student, text, cut_renamed_control_tokens=True)


def test_padded_heads_are_cut_to_the_real_ids_and_said_once(caplog):
    """Qwen: 151,669 tokens, heads of 151,936 and 152,064 rows; whoever compares each with each never ends."""
    tokens = [f"t{i}" for i in range(151_669)]
    student, teacher = Ids(tokens), Ids([*tokens[:-4]])
    assert shared_vocabulary(student, student, 151_936, 152_064) == 151_669
    assert shared_vocabulary(student, teacher, 151_936, 152_064) == 151_665
    assert shared_vocabulary(student, student, 151_936, 152_064) == 151_669
    cuts = [record.message for record in caplog.records if "cut to the 151669" in record.message]
    assert len(cuts) == 1 and "151936" in cuts[0] and "152064" in cuts[0]


def test_a_head_smaller_than_the_tokenizer_cuts_with_a_warning(caplog):
    assert shared_vocabulary(make_tokenizer(), make_tokenizer(), 30, 64) == 30
    assert caplog.records[0].levelno == logging.WARNING and "30 (student)" in caplog.text


def test_equal_sizes_say_nothing(caplog):
    assert shared_vocabulary(make_tokenizer(), make_tokenizer(), 40, 40) == 40
    assert not caplog.records
