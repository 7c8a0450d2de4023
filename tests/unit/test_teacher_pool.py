"""Several servers of one teacher, answers that are remembered, and the server of another model.

Oracle: `LocalTeacher`, whose numbers are checked against whole softmaxes elsewhere; what the servers counted.
"""

import logging
import threading
import time

import pytest
import torch

from taopd.errors import ConfigError, TeacherError, TeacherUnavailable
from taopd.teachers import (
    AskedOnce,
    LocalTeacher,
    connect,
    connect_all,
    teacher_pool,
    transport,
)
from taopd.trainer.config import TeachabilityConfig
from tests.conftest import make_model
from tests.e2e.test_trainer import CPU
from tests.scripted_server import ScriptedServer, slow, status

VOCAB, K = 40, 4
SEQUENCES = [[5, 6, 7, *range(8 + n, 12 + n)] for n in range(8)]
STARTS = [3] * 8
OPTIONS = {"vocab_size": VOCAB, "top_k": K, "timeout_s": 5.0}


@pytest.fixture(scope="module")
def model():
    return make_model(seed=1, hidden_size=32).eval()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(teacher_pool, "RETRY_S", 0.25)
    monkeypatch.setattr(teacher_pool, "WAIT_S", 0.02)


@pytest.fixture
def two(model, quick):
    with ScriptedServer(model, exact=True) as one, ScriptedServer(model, exact=True) as other:
        yield one, other


def wanted(num_rows=32):
    return torch.arange(K).expand(num_rows, K).contiguous()


def assert_right(scores, model, sequences=SEQUENCES):
    starts = [3] * len(sequences)
    local = LocalTeacher(model, VOCAB).score(sequences, starts, wanted(len(scores.logprobs)), K)
    torch.testing.assert_close(scores.logprobs, local.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.want_logprobs, local.want_logprobs, rtol=0, atol=1e-5)


def connections():
    """Each has a thread; one that was told to end takes a moment."""
    time.sleep(0.1)
    return sum(thread.name == "teacher" for thread in threading.enumerate())


def pool_of(*servers, patience_s=5.0):
    return connect_all([server.url for server in servers], patience_s=patience_s, **OPTIONS)


def test_sequences_go_to_the_least_loaded(two, model):
    """One answers slowly: the other gets more of a second call's sequences; all answers are right."""
    teacher = pool_of(*two)
    assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
    counted = [server.answered for server in two]
    assert abs(counted[0] - counted[1]) <= 1, "eight sequences at once are four each"
    two[0].always = slow(0.6)
    for _ in range(2):
        # The slow one still has the request of a caller that does not wait.
        busy = teacher._members[0].teacher.submit(SEQUENCES[0], 3, None, K)
        teacher._members[0].in_flight += 3
        before = two[1].answered
        teacher.score(SEQUENCES[:3], STARTS[:3], wanted(12), K)
        assert two[1].answered - before == 3
        teacher._members[0].in_flight -= 3
        busy.result()
    assert teacher.describe()["url"] == f"{two[0].url}, {two[1].url}"
    teacher.close()


def test_a_dead_server_is_left_out_said_once_and_used_again_when_it_is_back(two, model, caplog):
    caplog.set_level(logging.WARNING)
    teacher = pool_of(*two)
    two[0].stop()
    for _ in range(3):
        assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
        time.sleep(0.3)
    assert caplog.text.count(f"{two[0].url} is left out") == 1
    assert two[1].answered >= 24
    two[0].start()
    time.sleep(0.3)
    before = two[0].answered
    for _ in range(2):
        assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
    assert two[0].answered > before
    assert caplog.text.count(f"{two[0].url} is back") == 1
    teacher.close()


def test_one_that_is_away_at_the_start_joins_later(two, model, caplog):
    two[1].stop()
    teacher = pool_of(*two)
    assert f"{two[1].url} is left out" in caplog.text
    assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
    two[1].start()
    time.sleep(0.3)
    deadline = time.monotonic() + 10
    while not two[1].answered > 4 and time.monotonic() < deadline:
        assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
        time.sleep(0.05)
    assert two[1].answered > 4, "the probes of a connection are three"
    teacher.close()


def test_none_that_answers_is_an_error_after_the_patience(two):
    teacher = pool_of(*two, patience_s=0.5)
    for server in two:
        server.always = status(503)
    began = time.monotonic()
    with pytest.raises(
        TeacherUnavailable, match=r"none of 2 servers .*teacher_patience_s=0\.5.*503"
    ):
        teacher.score(SEQUENCES, STARTS, None, K)
    assert time.monotonic() - began > 0.4, "the patience was not used"
    teacher.close()
    for server in two:
        server.stop()
    with pytest.raises(TeacherUnavailable, match="none of 2 servers of one teacher answers"):
        pool_of(*two)


def test_servers_of_two_models_are_refused_with_both_names(two):
    two[1].name = "another"
    before = connections()
    with pytest.raises(TeacherError, match=r"serves 'tiny-teacher' and .* serves 'another'"):
        pool_of(*two)
    assert connections() == before


def test_a_server_that_joins_with_another_model_is_not_used_and_not_kept(two, model):
    """It is tried again and again: each time a connection would be left open."""
    two[1].stop()
    teacher = pool_of(*two)
    before, two[1].name = connections(), "another"
    two[1].start()
    for _ in range(20):
        assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
        time.sleep(0.1)
    assert "serves 'another'" in teacher._members[1].problem
    assert connections() <= before + 1, "one of them may be in the making"
    teacher.close()


def test_requests_that_nobody_waits_for_any_more_are_cancelled(two):
    teacher = pool_of(*two)
    two[0].always, two[1].always = status(400), slow(3.0)
    with pytest.raises(TeacherError, match="refuses with status 400"):
        teacher.score(SEQUENCES, STARTS, None, K)
    deadline = time.monotonic() + 1.0
    while any(member.in_flight for member in teacher._members) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [member.in_flight for member in teacher._members] == [0, 0]
    teacher.close()


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        ([], "a URL, or a list of them"),
        ([3], "a list of texts or text"),
        (["http://a"] * 2, "twice"),
        (["http://a", "http://a/v1/"], "twice"),
        (["http://a:80", "http://A/"], "twice"),
        (["https://a/x", "https://a:443/x/"], "twice"),
    ],
)
def test_lists_of_addresses_that_are_none(tmp_path, urls, words):
    with pytest.raises(ConfigError, match=words):
        TeachabilityConfig(str(tmp_path), **CPU, loss="sampled_reverse_kl", teacher_url=urls)


def test_a_server_of_another_model_is_refused_with_both_names(two):
    url = two[0].url
    for name in ("org/Tiny-Teacher", "/models/tiny-teacher/"):
        connect(url, **OPTIONS, model=name).close()
    with pytest.raises(TeacherError, match=r"serves 'tiny-teacher', and teacher_model.* 'org/big'"):
        connect(url, **OPTIONS, model="org/big")


class Counting(LocalTeacher):
    """Notes the sequences that it is asked for."""

    def __init__(self, model):
        super().__init__(model, VOCAB)
        self.asked = []

    def score(self, token_ids, *rest):
        self.asked += [tuple(ids) for ids in token_ids]
        return super().score(token_ids, *rest)


def test_one_question_is_asked_once(model):
    """Twice in one call, and again in a later one; not one with another prompt, start or wanted ids."""
    inner = Counting(model)
    teacher = AskedOnce(inner)
    twice = [SEQUENCES[0], SEQUENCES[1], SEQUENCES[0]]
    assert_right(teacher.score(twice, [3] * 3, wanted(12), K), model, twice)
    assert_right(teacher.score(SEQUENCES, STARTS, wanted(), K), model)
    assert inner.asked == [tuple(ids) for ids in (SEQUENCES[0], SEQUENCES[1], *SEQUENCES[2:])]
    inner.asked.clear()
    teacher.score([SEQUENCES[0]], [4], wanted(3), K)
    teacher.score([SEQUENCES[0]], [3], wanted(4) + 1, K)
    teacher.score([SEQUENCES[0]], [3], None, K)
    teacher.score([[9, *SEQUENCES[0]]], [4], wanted(4), K)
    assert len(inner.asked) == 4


def test_what_is_remembered_is_bounded(model, monkeypatch):
    from taopd.teachers import asked_once

    monkeypatch.setattr(asked_once, "MOST_TOKENS", 8)
    inner = Counting(model)
    teacher = AskedOnce(inner)
    for _ in range(2):
        for ids in SEQUENCES[:3]:  # four tokens each: two fit
            assert_right(teacher.score([ids], [3], wanted(4), K), model, [ids])
    assert len(inner.asked) == 6
    assert len(teacher._known) == 2


def test_an_answer_that_failed_is_not_remembered(two, model):
    teacher = AskedOnce(connect(two[0].url, **OPTIONS, patience_s=0.0))
    two[0].script.append(status(400))
    with pytest.raises(TeacherError, match="400"):
        teacher.score(SEQUENCES[:1], [3], wanted(4), K)
    assert_right(teacher.score(SEQUENCES[:1], [3], wanted(4), K), model, SEQUENCES[:1])
