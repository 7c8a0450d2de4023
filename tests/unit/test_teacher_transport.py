"""Requests to a scripted server on loopback. Oracles: the script, and counts of the requests that arrived."""

import itertools
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import CancelledError

import pytest

from taopd.errors import ConfigError, TeacherError, TeacherUnavailable
from taopd.teachers import Transport, transport
from tests.scripted_server import ScriptedServer, body, cut, drip, hang_up, slow, status

LONG_S = 120.0
"""No test waits so long for an answer."""


class Echo(ScriptedServer):
    """Answers {"ok": n}, n counted over the requests; no model."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__(_NoModel())

    def post(self, path, body):
        with self.lock:
            self.count += 1
        return 200, {"ok": self.count}


class _NoModel:
    def eval(self):
        return self


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.01)
    with Echo() as echo:
        yield echo


@pytest.fixture
def connect():
    """Makes transports, and closes them."""
    made = []

    def make(server, **settings):
        # Longer than any wait on a busy machine: a test of them names its own.
        known = {"timeout_s": LONG_S, "patience_s": LONG_S}
        made.append(Transport(server.url, **(known | settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def call(line: Transport, read=lambda document: document["ok"]):
    return line.submit("/score", {}, read).result(timeout=LONG_S)


@pytest.mark.parametrize(
    "failure",
    [
        status(500),
        status(503),
        status(429),
        body(b"<html>"),
        body(b""),
        cut(0.0),
        cut(0.5),
        hang_up,
    ],
    ids=["500", "503", "429", "html", "empty", "no body", "half a body", "hang up"],
)
def test_a_failure_is_tried_again_until_it_is_over(server, connect, failure):
    server.script.extend([failure] * 4)
    assert call(connect(server)) == 5


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_server_that_has_moved_is_told_with_where_to(server, connect, code):
    def moved(handler, _):
        handler.send_response(code)
        handler.send_header("Location", "https://elsewhere.invalid/score")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.always = moved
    with pytest.raises(
        TeacherError, match=f"answers {code} and leads to https://elsewhere.*teacher_url"
    ):
        call(connect(server))


def test_a_refusal_is_not_tried_again_and_says_what_the_server_said(server, connect):
    server.always = status(400, b'{"error": {"message": "too many logprobs"}}')
    with pytest.raises(TeacherError, match=r"/score refuses with status 400: too many logprobs"):
        call(connect(server))
    assert server.count == 1


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (status(502, b"bad gateway"), "last: status 502: bad gateway"),
        (slow(1.0), "last: no whole answer within 0.2 s"),
        (drip(0.05), "last: no whole answer within 0.2 s"),
        (drip(0.05, headers=True), "last: no whole answer within 0.2 s"),
    ],
    ids=["502", "slow", "drip", "dripping headers"],
)
def test_patience_ends_with_the_url_and_the_last_status(server, connect, failure, said):
    server.always = failure
    line = connect(server, timeout_s=0.2, patience_s=0.5)
    with pytest.raises(TeacherUnavailable) as caught:
        call(line)
    assert server.url in str(caught.value) and said in str(caught.value)
    assert "teacher_patience_s=0.5" in str(caught.value)


def test_patience_zero_takes_the_first_failure(server, connect):
    server.always = status(500)
    with pytest.raises(TeacherUnavailable):
        call(connect(server, patience_s=0.0))
    assert server.count == 1


@pytest.mark.parametrize(
    ("header", "asked"),
    [("7", 7.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0), ("soon", 0.0), ("-3", 0.0), (None, 0.0)],
)
@pytest.mark.parametrize("code", [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    server, connect, monkeypatch, header, asked, code
):
    def busy(handler, _):
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        if header is not None:
            handler.send_header("Retry-After", header)
        handler.end_headers()

    told = []
    # Told, and not waited for.
    monkeypatch.setattr(
        transport, "wait_after", lambda _, asked_s, left_s: told.append(asked_s) or 0.0
    )
    server.script.append(busy)
    assert call(connect(server)) == 2 and told == [asked]


def test_the_wait_is_the_longer_one_within_the_patience():
    assert transport.wait_after(0, 7.0, 600.0) == 7.0
    assert transport.wait_after(0, 3600.0, 20.0) == 20.0
    assert 5.0 <= transport.wait_after(9, 3.0, 600.0) <= 10.0


def test_an_answer_that_cannot_be_true_is_asked_for_three_times(server, connect):
    def refuse(document):
        raise TeacherError(f"untrue {document['ok']}")

    with pytest.raises(TeacherError, match="cannot be true, 3 times: untrue 3"):
        call(connect(server), refuse)
    assert server.count == 3


def test_an_answer_that_is_true_the_second_time_is_taken(server, connect):
    def even(document):
        if document["ok"] % 2:
            raise TeacherError("odd")
        return document["ok"]

    assert call(connect(server), even) == 2


def test_no_more_than_the_limit_are_in_flight(server, connect):
    most, now, lock = 0, 0, threading.Lock()

    def watch(handler, answer):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        handler.send_bytes(200, answer)

    server.always = watch
    line = connect(server, connections=4)
    answers = [line.submit("/score", {}, lambda d: d["ok"]) for _ in range(16)]
    assert {each.result(timeout=LONG_S) for each in answers} == set(range(1, 17))
    assert most == 4


def test_a_failing_server_is_tried_by_one_request_at_a_time(server, connect, monkeypatch):
    """After `FAILING` failures of 16 concurrent requests no two attempts overlap."""
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", 0.05)
    spans, lock = [], threading.Lock()
    # On a busy machine one of them could begin when others are tried again.
    first, all_here = iter(range(16)), threading.Barrier(16)

    def fail(handler, answer):
        began = time.monotonic()
        with lock:
            is_first = next(first, None) is not None
        if is_first:
            all_here.wait(timeout=LONG_S)
        time.sleep(0.02)
        with lock:
            spans.append((began, time.monotonic()))
        handler.send_bytes(500, b"{}")

    server.script.extend([fail] * 40)
    line = connect(server, connections=16)
    answers = [line.submit("/score", {}, lambda d: d["ok"]) for _ in range(16)]
    assert len({each.result(timeout=LONG_S) for each in answers}) == 16
    later = sorted(spans)[20:]
    assert len(later) == 20
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(later))


def test_an_open_breaker_fails_at_once_and_is_tried_again_later(server, connect, monkeypatch):
    server.always = status(500)
    line = connect(server, patience_s=0.05)
    with pytest.raises(TeacherUnavailable):
        call(line)
    tried = server.count
    with pytest.raises(TeacherUnavailable):
        call(line)
    assert server.count == tried, "an open breaker asked the server"
    server.always = None
    monkeypatch.setattr(transport, "LONGEST_WAIT_S", 0.0)
    assert call(line) == tried + 1


def test_a_server_that_restarts_on_its_port_is_found_again(server, connect):
    line = connect(server)
    assert call(line) == 1
    server.stop()
    waiting = line.submit("/score", {}, lambda d: d["ok"])
    time.sleep(0.1)
    assert not waiting.done()
    server.start()
    assert waiting.result(timeout=LONG_S) == 2


def test_a_caller_who_stops_waiting_cancels_the_request(server, connect):
    server.always = slow(0.3)
    line = connect(server)
    waiting = [line.submit("/score", {}, lambda d: d["ok"]) for _ in range(3)]
    for each in waiting:
        each.cancel()
    server.always = None
    assert all(each.cancelled() for each in waiting)
    assert call(line) >= 1


def test_an_unreachable_server_is_named():
    line = Transport("http://127.0.0.1:9", timeout_s=1.0)
    with pytest.raises(TeacherUnavailable, match=r"http://127\.0\.0\.1:9/version: ConnectError"):
        line.get("/version")
    line.close()


def authorizations(server, code, document):
    """The header of every request from now on, which gets this answer."""
    seen = []

    def look(handler, answer):
        seen.append(handler.headers["Authorization"])
        handler.send_bytes(code, document)

    server.always = look
    return seen


def test_the_key_of_the_environment_is_sent_and_written_nowhere(server, connect, monkeypatch):
    monkeypatch.setenv(transport.KEY, "s3cret")
    seen = authorizations(server, 401, b'{"error": "Unauthorized"}')
    with pytest.raises(TeacherError, match="status 401: Unauthorized") as caught:
        call(connect(server))
    assert seen == ["Bearer s3cret"] and "s3cret" not in str(caught.value)


def test_the_line_break_of_a_key_is_dropped(server, connect, monkeypatch):
    monkeypatch.setenv(transport.KEY, " s3cret\n")
    seen = authorizations(server, 200, b'{"ok": 1}')
    call(connect(server))
    assert seen == ["Bearer s3cret"]


@pytest.mark.parametrize("key", ["s3cr\u00e9t", "s3\ncret", "s3\tcret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(key, monkeypatch):
    monkeypatch.setenv(transport.KEY, key)
    with pytest.raises(ConfigError, match=transport.KEY) as caught:
        Transport("http://127.0.0.1:9")
    assert "s3" not in str(caught.value)


def test_closing_cancels_what_waits(server):
    server.always = slow(30.0)
    line = Transport(server.url)
    waiting = line.submit("/score", {}, lambda document: document)
    time.sleep(0.1)
    line.close()
    with pytest.raises(CancelledError):
        waiting.result(timeout=10)


def compressed(document: bytes, megabytes: int = 0, *, named: str = "gzip"):
    """Answers with gzip, the document followed by so much white space."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    text = packer.compress(document)
    text += b"".join(packer.compress(b" " * (1 << 20)) for _ in range(megabytes))
    text += packer.flush()

    def behave(handler, _):
        handler.send_response(200)
        handler.send_header("Content-Encoding", named)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    return behave


def test_a_compressed_answer_is_read_and_one_that_unpacks_without_end_is_cut_off(server, connect):
    line = connect(server, connections=8)
    server.script.append(compressed(b'{"ok": 7}'))
    assert call(line) == 7
    server.always = compressed(b'{"ok": 7}', 100)
    tracemalloc.start()
    try:
        futures = [line.submit("/score", {}, dict, most_bytes=4 << 20) for _ in range(8)]
        for future in futures:
            with pytest.raises(TeacherError, match="more than the question can have"):
                future.result(timeout=60)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    print(f"8 answers of 100 MiB: peak {peak:.0f} MiB")
    assert peak < 100.0


@pytest.mark.parametrize("named", ["GZIP", "x-gzip", "Deflate"])
def test_a_compression_is_known_by_each_of_its_names(server, connect, named):
    server.script.append(compressed(b'{"ok": 7}', named=named))
    assert call(connect(server)) == 7


def test_all_answers_together_are_limited(server, connect, monkeypatch):
    monkeypatch.setattr(transport, "MOST_BYTES", 1 << 20)
    server.always = compressed(b'{"ok": 7}', 2)
    line = connect(server, patience_s=0.2)
    with pytest.raises(TeacherUnavailable, match="more than 1 MiB together"):
        line.submit("/score", {}, dict, most_bytes=4 << 20).result(timeout=LONG_S)
    server.always = None
    assert line._held == 0


def test_an_unknown_compression_is_refused(server, connect):
    def behave(handler, answer):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "br")
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    server.always = behave
    with pytest.raises(TeacherError, match="compressed with br"):
        call(connect(server))
