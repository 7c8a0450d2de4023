"""Readers of vLLM and SGLang, and signals through them, against a scripted server and the model itself.

Oracles: `LocalTeacher`, whose numbers are checked against whole softmaxes elsewhere; `score_positions`, the
scoring of a teacher in this process; `topk_lists_signals` for the lower bound.
"""

import re
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd import TeachabilityConfig
from taopd.errors import ConfigError, NumericsError, TeacherError, TeacherUnavailable
from taopd.models.batch import Positions
from taopd.models.output_head import read_head
from taopd.models.scoring import score_positions
from taopd.signals import topk_lists_signals
from taopd.teachers import (
    LocalTeacher,
    Teacher,
    as_bound,
    connect,
    score_remote,
    sglang,
    transport,
)
from taopd.teachers.addresses import check_addresses
from tests.conftest import make_model
from tests.scripted_server import ScriptedServer, body, status
from tests.unit.test_scoring import padded_batch

VOCAB, K = 40, 5
CPU = {"use_cpu": True, "bf16": False}
CLOSE = {"rtol": 0.0, "atol": 1e-5}
NOT_SERVED = {"teacher_entropy"}


@pytest.fixture(scope="module")
def models(micro_lab):
    """Student and teacher, sharper than random weights are, so that the two disagree."""
    found = []
    for path in (micro_lab.student, micro_lab.teacher):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.lm_head.weight.data *= 20.0
        found.append(model)
    return found


@pytest.fixture(params=["vllm", "vllm exact", "sglang"])
def server(request, models, monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.01)
    kind, _, exact = request.param.partition(" ")
    with ScriptedServer(models[1], kind, exact=bool(exact)) as running:
        yield running


@pytest.fixture
def reach():
    """Connects to servers, and closes what it opened."""
    opened = []

    def make(server, **settings):
        usual = {"vocab_size": VOCAB, "top_k": K, "patience_s": 1.0, "timeout_s": 5.0}
        opened.append(connect(server.url, **(usual | settings)))
        return opened[-1]

    yield make
    for teacher in opened:
        teacher.close()


def forward(vocab_size, model, part):
    hidden = model.base_model(
        input_ids=part.input_ids, attention_mask=part.attention_mask
    ).last_hidden_state
    return hidden[:, -part.num_completion - 1 : -1], read_head(model, vocab_size)


SEQUENCES, STARTS = [[5, 14, 6, 15, 8, 2], [1, 7, 9], [3, 4, 5, 6, 7, 8, 9]], [4, 1, 3]
WANT = torch.randint(0, VOCAB, (8, 3), generator=torch.Generator().manual_seed(1))


def test_scores_are_the_local_teachers(server, models, reach):
    teacher = reach(server)
    assert isinstance(teacher, Teacher)
    exact = server.kind == "sglang" or server.exact
    assert teacher.describe()["exact"] == exact
    assert teacher.describe()["kind"] == server.kind
    found = teacher.score(SEQUENCES, STARTS, WANT, K)
    truth = LocalTeacher(models[1], VOCAB).score(SEQUENCES, STARTS, WANT, K)
    torch.testing.assert_close(found.logprobs, truth.logprobs, **CLOSE)
    torch.testing.assert_close(found.topk_logprobs, truth.topk_logprobs, **CLOSE)
    assert torch.equal(found.topk_ids, truth.topk_ids)
    assert found.exact == exact
    if exact:
        torch.testing.assert_close(found.want_logprobs, truth.want_logprobs, **CLOSE)
    assert teacher.score(SEQUENCES, STARTS, None, K).want_logprobs is None


def test_what_a_server_does_not_say_is_said_by_the_probe(models, reach):
    with ScriptedServer(models[1]) as plain:
        why = reach(plain).describe()["why"]
    assert "/inference/v1/generate" in why and "404" in why
    with ScriptedServer(models[1], exact=True) as lying:
        lying.tamper = lambda answer: {
            key: value for key, value in answer.items() if key != "prompt_token_id_logprobs"
        }
        about = reach(lying).describe()
        assert not about["exact"] and "prompt_token_id_logprobs" in about["why"]


def signals_of(models, teacher, batch, positions, *, size=2, vocab_size=VOCAB, **more):
    return score_remote(
        partial(forward, vocab_size),
        models[0],
        teacher,
        batch,
        positions,
        micro_batch_size=size,
        vocab_size=vocab_size,
        k=K,
        when="step 3",
        **more,
    ).signals


def exact_signals_of(models, batch, positions, *, vocab_size=VOCAB, size=2):
    return score_positions(
        partial(forward, vocab_size),
        *models,
        batch,
        positions,
        micro_batch_size=size,
        k=K,
        temperature=1.0,
        keep_teacher_hidden=False,
        when="",
    ).signals


def assert_same(found, expected, skipped=()):
    for column in fields(expected):
        one, other = getattr(found, column.name), getattr(expected, column.name)
        if column.name in skipped:
            continue
        if isinstance(other, torch.Tensor) and other.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=column.name)
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), column.name
        else:
            assert one == other, column.name


def some_positions(batch, seed):
    """Most completion positions, one row without any, and no first token in another."""
    mask = batch["completion_mask"].bool()
    mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[1] = False
    mask[2, 0] = False
    return Positions.of(mask)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 8])
def test_signals_of_a_local_teacher_are_those_of_scoring(models, size):
    """Unequal prompts, padding, a row without positions, skipped tokens, all micro-batch sizes."""
    for seed in range(5):
        batch = padded_batch(seed, num_rows=5)
        positions = some_positions(batch, seed)
        found = signals_of(models, LocalTeacher(models[1], VOCAB), batch, positions, size=size)
        expected = exact_signals_of(models, batch, positions)
        assert len(found) == len(positions) > 0
        assert_same(found, expected, NOT_SERVED)
        assert found.teacher_entropy is None


@torch.no_grad()
def test_signals_of_servers_are_exact_or_the_bound_of_two_lists(server, models, reach):
    batch = padded_batch(7, num_rows=5)
    positions = some_positions(batch, 7)
    found = signals_of(models, reach(server), batch, positions)
    exact = exact_signals_of(models, batch, positions)
    if found.compatibility_is_exact:
        assert_same(found, exact, NOT_SERVED)
        return
    lists = topk_lists_signals(
        exact.student_topk_ids,
        exact.student_topk_logprobs,
        exact.teacher_topk_ids,
        exact.teacher_topk_logprobs,
        k=K,
    )
    sampled = {
        name: getattr(exact, name) for name in ("token_ids", "student_logprobs", "teacher_logprobs")
    }
    assert_same(found, replace(lists, full_entropy=exact.entropy, **sampled))
    assert (found.compatibility <= exact.compatibility + 1e-5).all()
    assert (found.compatibility < exact.compatibility - 1e-3).any(), "vacuous: the bound is tight"
    assert_same(as_bound(exact), found, {"token_ids"})


@torch.no_grad()
def test_ids_that_the_student_lacks_are_cut_from_the_lists(models):
    """A teacher of 48 ids, a student of 40: lists are shorter, and D counts only shared ids.

    Oracle: the definition on the shared ids of both supports, row by row in float64.
    """
    teacher = make_model(seed=3, hidden_size=32, vocab_size=48).eval()
    teacher.lm_head.weight.data *= 20.0
    batch = padded_batch(2)
    positions = some_positions(batch, 2)
    found = signals_of(models, LocalTeacher(teacher, 48), batch, positions)
    assert (found.teacher_topk_ids < 0).any(), "vacuous: no list held a foreign id"
    assert (found.teacher_topk_ids < VOCAB).all()
    student = exact_signals_of(models, batch, positions)
    assert torch.equal(found.student_topk_ids, student.student_topk_ids)
    for row in range(len(positions)):
        at, column = int(positions.row[row]), int(positions.column[row])
        tokens = torch.cat([batch["prompt_ids"][at], batch["completion_ids"][at, : column + 1]])
        seen = torch.cat(
            [batch["prompt_mask"][at].bool(), torch.ones(column + 1, dtype=torch.bool)]
        )
        log_p, log_q = (
            model(input_ids=tokens[seen][None]).logits[0, -2].double().log_softmax(-1)
            for model in (models[0], teacher)
        )
        own = log_p.topk(K).indices
        theirs = [i for i in log_q.topk(K).indices.tolist() if i < VOCAB]
        union = torch.tensor(sorted({*own.tolist(), *theirs}))
        p, q = (values[union].log_softmax(0) for values in (log_p, log_q))
        assert float(found.disagreement[row]) == pytest.approx(
            float((q.exp() * (q - p)).sum()), abs=1e-4
        )
        assert float(found.compatibility[row]) == pytest.approx(
            float(log_q[own].exp().sum()), abs=1e-5
        )


@torch.no_grad()
def test_beyond_sglangs_cap_the_whole_batch_is_a_bound(models, reach, monkeypatch):
    """One long row asks for more ids than the cap: no position of the batch is exact, in any micro-batch."""
    batch = padded_batch(1, num_rows=4)
    positions = Positions.of(batch["completion_mask"].bool())
    with ScriptedServer(models[1], "sglang") as server:
        teacher = reach(server)
        exact = signals_of(models, teacher, batch, positions, size=1)
        assert exact.compatibility_is_exact
        ids = [
            len(set(exact.student_topk_ids[positions.row == row].flatten().tolist()))
            for row in range(4)
        ]
        monkeypatch.setattr(sglang, "MOST_IDS", max(ids) - 1)
        assert min(ids) <= max(ids) - 1, "vacuous: every row is beyond the cap"
        found = signals_of(models, teacher, batch, positions, size=1)
    assert not found.compatibility_is_exact and found.teacher_at_student_ids is None
    assert_same(found, as_bound(exact), {"token_ids"})


@torch.no_grad()
def test_the_teacher_scores_while_the_student_runs(models):
    """The first micro-batch is asked for before the student's last forward begins."""
    events = []

    class Slow(LocalTeacher):
        def score(self, *args):
            events.append("asked")
            time.sleep(0.05)
            answer = super().score(*args)
            events.append("answered")
            return answer

    def noted(model, part):
        time.sleep(0.02)
        events.append("student")
        return forward(VOCAB, model, part)

    batch = padded_batch(4, num_rows=6)
    positions = Positions.of(batch["completion_mask"].bool())
    score_remote(
        noted,
        models[0],
        Slow(models[1], VOCAB),
        batch,
        positions,
        micro_batch_size=1,
        vocab_size=VOCAB,
        k=K,
        when="",
    )
    last = len(events) - 1 - events[::-1].index("student")
    assert events[:2] == ["student", "asked"]
    assert "answered" in events[:last], events


@torch.no_grad()
def test_an_error_of_the_teacher_and_a_nan_of_the_student_arrive(models, server, reach):
    batch = padded_batch(3)
    positions = Positions.of(batch["completion_mask"].bool())
    teacher = reach(server, patience_s=0.0)
    server.always = status(500)
    with pytest.raises(TeacherUnavailable, match="status 500"):
        signals_of(models, teacher, batch, positions)
    broken = AutoModelForCausalLM.from_config(models[0].config).eval()
    broken.lm_head.weight.data[:] = torch.nan
    with pytest.raises(NumericsError, match="step 3, completion 0 of the batch"):
        signals_of([broken], LocalTeacher(models[1], VOCAB), batch, positions)


def longer_entry(answer):
    """One list entry more or less."""
    for holder in answer.get("choices", []):
        if holder.get("prompt_logprobs"):
            holder["prompt_logprobs"].append(holder["prompt_logprobs"][-1])
    if "prompt_logprobs" in answer:
        answer["prompt_logprobs"].pop()
    for column in answer.get("meta_info", {}).values():
        column.extend(column[-2:])
    return answer


LIES = {
    "entries": longer_entry,
    "malformed answer": lambda answer: [answer],
    "malformed answer (KeyError": lambda answer: {},
}


@pytest.mark.parametrize("message", LIES)
def test_a_lie_is_refused_three_times_with_the_place(server, reach, message):
    teacher = reach(server)
    before = server.answered
    server.tamper = LIES[message]
    with pytest.raises(TeacherError) as caught:
        teacher.score(SEQUENCES[:1], STARTS[:1], WANT[:2], K)
    assert message in str(caught.value) and "3 times" in str(caught.value)
    assert server.url in str(caught.value)
    assert server.answered == before + 3


def test_another_sequences_answer_is_refused(server, reach):
    teacher = reach(server)
    kept = []
    server.tamper = lambda answer: kept.append(answer) or kept[0]
    teacher.score([[5, 6, 7]], [1], WANT[:2], K)
    with pytest.raises(TeacherError, match=r"another sequence|malformed answer"):
        teacher.score([[5, 30, 31]], [1], WANT[:2], K)


def test_a_sequence_without_prompt_or_completion_is_named(server, reach):
    with pytest.raises(TeacherError, match="both parts need a token"):
        reach(server).score([[5, 6]], [2], None, K)


@pytest.mark.parametrize(
    "address",
    [
        *("http://", "http://:80", "http:///v1", "http://[::1", "http://local host:80"),
        *("http://127.0.0.1:99999", "http://127.0.0.1:-1", "http://127.0.0.1:0", "http://a:port"),
        *("http://127.0.0.1:9 ", "http://127.0.0.1:9?model=x", "https://host/v1#here"),
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_asked_or_loaded(address):
    told = rf"teacher_url={re.escape(repr(address))}: must be http://HOST:PORT"
    with pytest.raises(ConfigError, match=told):
        connect(address, vocab_size=VOCAB, top_k=K)
    for value in (address, ["http://127.0.0.1:9", address]):
        with pytest.raises(ConfigError, match=told):
            TeachabilityConfig("unused", teacher_url=value, loss="sampled_reverse_kl", **CPU)


def test_a_password_is_not_repeated_whatever_else_is_wrong():
    for address in ("me:secret@host:80", "http://me:secret@host:99999"):
        with pytest.raises(ConfigError, match="TAOPD_TEACHER_KEY") as caught:
            check_addresses(address)
        assert "secret" not in str(caught.value)
    check_addresses(
        ["http://127.0.0.1:8000/v1", "https://teacher.example:65535/path", "http://[::1]:80"]
    )


def test_connecting_says_what_is_wrong(models):
    settings = {"vocab_size": VOCAB, "top_k": K}
    with pytest.raises(ConfigError, match="must begin with http"):
        connect("localhost:8000", **settings)
    with pytest.raises(ConfigError, match=r"TAOPD_TEACHER_KEY") as caught:
        connect("http://me:secret@localhost:8000", **settings)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"teacher_server='vlm' is unknown. Did you mean 'vllm'"):
        connect("http://localhost:8000", kind="vlm", **settings)
    with pytest.raises(
        TeacherUnavailable, match=r"127\.0\.0\.1:9/version: ConnectError.*teacher_url="
    ):
        connect("http://127.0.0.1:9", timeout_s=2.0, **settings)
    with ScriptedServer(models[1]) as other:
        other.get = lambda path: None
        with pytest.raises(TeacherError, match=r"neither vLLM nor SGLang: /version answers 404"):
            connect(other.url, **settings)
        other.get = lambda path: {"hello": "world"}
        with pytest.raises(TeacherError, match=r"does not answer /v1/models and /version as vLLM"):
            connect(other.url, **settings)
    with ScriptedServer(models[1]) as small:
        small.max_logprobs = 4
        with pytest.raises(TeacherError, match="status 400: Requested prompt logprobs of 5"):
            connect(small.url, **settings)
        small.always = body(b"<html>")
        with pytest.raises(TeacherUnavailable, match="no JSON"):
            connect(small.url, **settings)


def test_a_path_and_v1_in_the_url_are_understood(models, reach):
    with ScriptedServer(models[1]) as server:
        assert (
            connect(server.url + "/v1/", vocab_size=VOCAB, top_k=K).describe()["url"] == server.url
        )
