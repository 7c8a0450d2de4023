"""Requests to a server that may be slow, away or broken: time-outs, retries, a circuit breaker.

    attempt n waits min(10 s, 0.5 s * 2^n) * uniform(0.5, 1) after a failure
    since the last success anywhere more than `patience_s` ago: open, every request fails at once

Connection errors, time-outs, 429 and 5xx are tried again until the patience is over; while a server fails,
one request at a time tries it, so that it is not run over when it comes back. An answer that cannot be true
is asked for three times. Any other status is the caller's to mend, and is not tried again.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2 as httpx

from taopd.errors import TeacherError, TeacherUnavailable

MOST_BYTES = 1 << 30
"""Of an answer: 64 lists of 20 at 32,768 tokens are 60 MiB."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
READS = 3
"""How often an answer that cannot be true is asked for."""
FAILING = 3
"""Failures in a row, of all requests, after which one at a time tries."""

T = TypeVar("T")


class _Failed(Exception):
    """One attempt that may be tried again; says what the server did."""


class Transport:
    """JSON over HTTP to one server; safe to call from many threads.

    Args:
        url: of the server, with or without a path, without `/v1`.
        timeout_s: of one attempt, from its first byte to its last.
        patience_s: how long a server may stay away; 0: the first failure is the last.
        connections: kept open at most.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        connections: int = 32,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s, self._patience_s = timeout_s, patience_s
        limits = httpx.Limits(max_connections=connections)
        # Nothing but this server is asked, whatever proxies the environment names.
        self._client = httpx.Client(timeout=timeout_s, limits=limits, trust_env=False)
        self._lock, self._one_at_a_time = threading.Lock(), threading.Lock()
        self._failures, self._failing_since, self._status = 0, 0.0, "no request yet"

    def get(self, path: str) -> tuple[int, Any]:
        """Status and document of one attempt; TeacherUnavailable if there is no answer."""
        try:
            return self._send("GET", path, None)
        except _Failed as error:
            raise TeacherUnavailable(f"{self.url}{path}: {error}") from error

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and document of one attempt; TeacherUnavailable if there is no answer."""
        try:
            return self._send("POST", path, body)
        except _Failed as error:
            raise TeacherUnavailable(f"{self.url}{path}: {error}") from error

    def call(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """`read` of the document that the server answers with, tried again as the module says.

        Raises:
            TeacherUnavailable: names the URL, for how long it failed, and the last status.
            TeacherError: the server refuses the request, or `read` refused the answer three times.
        """
        attempt = refused = 0
        while True:
            self._raise_if_open(path)
            try:
                document = self._attempt(path, body)
                return read(document)
            except _Failed as error:
                self._failed(str(error))
            except TeacherError as error:
                if isinstance(error, _Refused):
                    raise
                refused += 1
                if refused == READS:
                    raise TeacherError(
                        f"{self.url}{path} answers what cannot be true, {READS} times: {error}"
                    ) from error
            wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 8)) * random.uniform(
                0.5, 1.0
            )
            time.sleep(min(wait, max(0.01, self._patience_s / 4)))
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _attempt(self, path: str, body: dict[str, Any]) -> Any:
        if self._failures < FAILING:
            return self._succeeded(path, *self._send("POST", path, body))
        with self._one_at_a_time:
            self._raise_if_open(path)
            return self._succeeded(path, *self._send("POST", path, body))

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """One attempt, within `timeout_s` in all: a server that drips is as late as one that sleeps."""
        deadline = time.monotonic() + self._timeout_s
        chunks, size = [], 0
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if time.monotonic() > deadline:
                        raise _Failed(f"no whole answer within {self._timeout_s:g} s")
                    if size > MOST_BYTES:
                        raise _Failed(f"an answer of more than {MOST_BYTES >> 20} MiB")
        except httpx.TimeoutException as error:
            raise _Failed(f"no answer within {self._timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Failed(f"{type(error).__name__}: {error}") from error
        status, text = response.status_code, b"".join(chunks)
        if status == 429 or status >= 500:
            raise _Failed(f"status {status}: {_short(text)}")
        try:
            return status, json.loads(text)
        except ValueError as error:
            if status == 200:
                raise _Failed(f"status 200, but no JSON: {_short(text)}") from error
            return status, {"error": _short(text)}

    def _succeeded(self, path: str, status: int, document: Any) -> Any:
        if status != 200:
            raise _Refused(f"{self.url}{path} refuses with status {status}: {_message(document)}")
        with self._lock:
            self._failures = 0
        return document

    def _failed(self, status: str) -> None:
        with self._lock:
            if self._failures == 0:
                self._failing_since = time.monotonic()
            self._failures += 1
            self._status = status

    def _raise_if_open(self, path: str) -> None:
        with self._lock:
            away = time.monotonic() - self._failing_since if self._failures else -1.0
            if away >= self._patience_s:
                raise TeacherUnavailable(
                    f"the teacher at {self.url}{path} has failed for {away:.0f} s "
                    f"(teacher_patience_s={self._patience_s:g}); last: {self._status}"
                )


class _Refused(TeacherError):
    """A status that will not change by asking again."""


def _short(text: bytes) -> str:
    return " ".join(text[:300].decode(errors="replace").split())


def _message(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:500]
