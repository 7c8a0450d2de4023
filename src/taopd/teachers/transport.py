"""HTTP transport with time-outs, retries with backoff, and a circuit breaker.

    after failure n of a request it waits min(10 s, 0.5 s * 2^n) * uniform(0.5, 1), or what Retry-After says
    every request of the last `patience_s` failed: open, what waits fails, what is new is tried every 10 s

Connection errors, time-outs, 429 and 5xx are retried until the patience is over. While a server fails, one
request at a time is sent, so that it is not overloaded when it comes back. An answer that contradicts itself
is requested three times. Any other status is not retried.

All of it runs on one event loop in a daemon thread: a time-out holds even for a server that sends its answer
slowly, and a caller that stops waiting cancels its request.
"""

import asyncio
import json
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx2 as httpx

from taopd.errors import ConfigError, TeacherError, TeacherUnavailable
from taopd.teachers.answer_headers import seconds_of, unpacker

MOST_BYTES = 1 << 30
"""Unpacked, of all answers that are being received or read together: 64 lists of 20 at 32,768 tokens are
60 MiB."""
MOST_SMALL = 16 << 20
"""Of the answer to a request for something small, as a version or a list of models."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
READS = 3
"""Times that a contradictory answer is requested."""
KEY = "TAOPD_TEACHER_KEY"
"""Environment variable with the server's API key: settings are written into run folders."""
_NEED_A_KEY = (401, 403)
FAILING = 3
"""Consecutive failures of all requests after which only one at a time is sent."""

T = TypeVar("T")


class _Failed(Exception):
    """A failed attempt that may be retried; the message is what the server did."""

    def __init__(self, message: str, asked_s: float = 0.0) -> None:
        super().__init__(message)
        self.asked_s = asked_s
        """Seconds that the server asks to be left alone."""


class Transport:
    """JSON over HTTP to one server; safe to call from many threads.

    Args:
        url: of the server, with or without a path, without `/v1`.
        timeout_s: of one attempt, from its first byte to its last.
        patience_s: how long a server may stay away; 0: the first failure is the last.
        connections: requests in flight at most.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        connections: int = 32,
    ) -> None:
        self.url = server_of(url)
        self._timeout_s, self._patience_s = timeout_s, patience_s
        # Nothing but this server is asked, whatever proxies the environment names.
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        key = _key()
        self._client = httpx.AsyncClient(
            timeout=None,
            limits=limits,
            trust_env=False,
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        self._slots, self._one_at_a_time = asyncio.Semaphore(connections), asyncio.Lock()
        # What follows is read and written on the loop alone.
        self._failures, self._failing_since, self._tried = 0, 0.0, 0.0
        self._held = 0
        """Bytes of answers that are being received or read."""
        self._status = "no request yet"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True).start()

    def get(self, path: str) -> tuple[int, Any]:
        """Status and document of one attempt; TeacherUnavailable if there is no answer."""
        return self._once("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and document of one attempt; TeacherUnavailable if there is no answer."""
        return self._once("POST", path, body)

    def submit(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], T],
        *,
        most_bytes: int = MOST_BYTES,
    ) -> Future[T]:
        """`read` of the server's JSON document, with the retries of the module.

        Args:
            most_bytes: that an answer may unpack to.

        Raises (from `result()`):
            TeacherUnavailable: names the URL, for how long it failed, and the last status.
            TeacherError: the server refuses the request, or `read` refused the answer three times.
        """
        return self._start(self._call(path, body, read, most_bytes))

    def close(self) -> None:
        """Cancel requests in flight, close the connections and end the thread."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

        self._start(end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        try:
            return self._start(self._send(method, path, body)).result()
        except _Failed as error:
            raise TeacherUnavailable(f"{self.url}{path}: {error}") from error

    async def _call(
        self, path: str, body: dict[str, Any], read: Callable[[Any], T], most_bytes: int
    ) -> T:
        attempt = refused = 0
        while True:
            asked_s = 0.0
            try:
                async with self._slots:
                    self._raise_if_open(path)
                    status, document = await self._attempt(path, body, most_bytes)
                    if status != 200:
                        raise _Refused(f"{self.url}{path} {refusal(status, document)}")
                    return await asyncio.to_thread(read, document)
            except _Failed as failure:
                self._raise_if_open(path)
                asked_s = failure.asked_s
            except (_Refused, TeacherUnavailable):
                raise
            except TeacherError as error:
                refused += 1
                if refused == READS:
                    raise TeacherError(
                        f"{self.url}{path} answers what cannot be true, {READS} times: {error}"
                    ) from error
            await asyncio.sleep(wait_after(attempt, asked_s, self._time_left()))
            attempt += 1

    async def _attempt(self, path: str, body: dict[str, Any], most_bytes: int) -> tuple[int, Any]:
        if self._failures >= FAILING:
            async with self._one_at_a_time:
                if self._failures >= FAILING:  # Else it came back while this one waited.
                    self._raise_if_open(path)
                    return await self._answered(path, body, most_bytes)
        return await self._answered(path, body, most_bytes)

    async def _answered(self, path: str, body: dict[str, Any], most_bytes: int) -> tuple[int, Any]:
        try:
            answer = await self._send("POST", path, body, most_bytes)
        except _Failed as error:
            now = time.monotonic()
            self._failing_since = self._failing_since if self._failures else now
            self._failures += 1
            self._tried, self._status = now, str(error)
            raise
        self._failures = 0
        return answer

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None, most_bytes: int = MOST_SMALL
    ) -> tuple[int, Any]:
        """Status and document of one attempt, within `timeout_s` in all."""
        size = 0
        text = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, self.url + path, json=body) as response,
            ):
                unpack = unpacker(response.headers.get("content-encoding", "identity"))
                # Unpacked here, piece by piece: the client's own decoder would do a whole chunk at once.
                async for chunk in response.aiter_raw():
                    for piece in unpack(chunk):
                        text += piece
                        size += len(piece)
                        self._held += len(piece)
                        if size > most_bytes:
                            raise TeacherError(
                                f"an answer of more than {most_bytes >> 10} KiB, which is more than the "
                                "question can have"
                            )
                        if self._held > MOST_BYTES:
                            raise _Failed(f"answers of more than {MOST_BYTES >> 20} MiB together")
            status, elsewhere = response.status_code, response.headers.get("location")
            if response.is_redirect and elsewhere:
                # Not followed: the key would go along, and every question would be sent twice.
                raise _Refused(
                    f"{self.url}{path} answers {status} and leads to {elsewhere}: set teacher_url to where "
                    "the server is"
                )
            if status == 429 or status >= 500:
                asked_s = seconds_of(response.headers.get("retry-after"))
                raise _Failed(f"status {status}: {_short(text)}", asked_s)
            # Not on the loop, where the time-outs of other requests would wait for it.
            return status, await asyncio.to_thread(_document, status, text)
        except TimeoutError as error:
            raise _Failed(f"no whole answer within {self._timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, zlib.error) as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error
        finally:
            self._held -= size

    def _time_left(self) -> float:
        """Seconds of patience."""
        if self._failures == 0:
            return self._patience_s
        return self._failing_since + self._patience_s - time.monotonic()

    def _raise_if_open(self, path: str) -> None:
        now = time.monotonic()
        if self._failures and self._time_left() <= 0 and now - self._tried < LONGEST_WAIT_S:
            raise TeacherUnavailable(
                f"the teacher at {self.url}{path} has failed for {now - self._failing_since:.0f} s "
                f"(teacher_patience_s={self._patience_s:g}); last: {self._status}"
            )


def wait_after(attempt: int, asked_s: float, left_s: float) -> float:
    """Seconds between an attempt that failed and the next.

    Args:
        attempt: 0 for the first; asked_s: what the server asks for; left_s: of the patience.
    """
    own = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 8)) * random.uniform(0.5, 1.0)
    return min(max(own, asked_s), max(0.01, left_s))


def _key() -> str:
    """The server's key; "" where none is set.

    Raises:
        ConfigError: no header can hold it. It is not repeated, as the client's own message would.
    """
    # A file of one line ends with a line break.
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{KEY} holds a letter beyond ASCII or a control character: no key has one"
        )
    return key


def server_of(url: str) -> str:
    """An address without what makes no difference to where it leads."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class _Refused(TeacherError):
    """A status that is not retried."""


def _document(status: int, text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if status == 200:
            raise _Failed(f"status 200, but no JSON: {_short(text)}") from error
        return {"error": _short(text)}


def _short(text: bytes | bytearray) -> str:
    return " ".join(text[:300].decode(errors="replace").split())


def refusal(status: int, document: Any) -> str:
    """What a server does that answers with a status other than 200, and why."""
    return (
        f"refuses with status {status}: {message(document) or 'without a word'}{key_hint(status)}"
    )


def key_hint(status: int) -> str:
    """Where the key belongs that a server with this status asks for."""
    return (
        f" (its key belongs into the environment variable {KEY})" if status in _NEED_A_KEY else ""
    )


def message(document: Any) -> str:
    """The error message in a server's document, in at most 500 characters."""
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:500]
