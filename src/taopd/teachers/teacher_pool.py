"""Several servers of one teacher: each sequence goes to the least loaded one that answers.

A server that fails is left out and tried again with one request every `RETRY_S`; both are said in the log.
Sequences that it had go to the others. The patience of the settings is for all of them together: it runs
while none answers.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from jaxtyping import Int
from torch import Tensor

from taopd.errors import TeacherError, TeacherUnavailable
from taopd.teachers.protocol import TeacherScores, by_sequence, join
from taopd.teachers.server import ServerTeacher

logger = logging.getLogger(__name__)
RETRY_S = 10.0
"""Between two requests to a server that failed; a transport without patience sends none before."""
WAIT_S = 0.2
"""Between two looks while none answers."""


class _Member:
    """One server, connected when it first answers."""

    def __init__(self, url: str, connect: Callable[[str], ServerTeacher]) -> None:
        self.url, self._connect = url, connect
        self.teacher: ServerTeacher | None = None
        self.in_flight = 0
        self.down_since: float | None = None
        self.tried = 0.0
        self.problem = "no request yet"

    def connect(self) -> None:
        """Ask who it is.

        Raises:
            TeacherError: see `taopd.teachers.connect`.
        """
        self.tried = time.monotonic()
        self.teacher = self._connect(self.url)

    def load(self, now: float) -> float | None:
        """Requests in flight; None while it is left out."""
        if self.teacher is None:
            return None
        if self.down_since is None:
            return self.in_flight
        # One request finds out whether it is back.
        return 0.5 if not self.in_flight and now - self.tried >= RETRY_S else None


class TeacherPool:
    """A `Teacher` behind several addresses, all of which serve the same model.

    Args:
        urls: of the servers; connect: connects one of them, without patience of its own.
        patience_s: how long all of them may stay away.

    Raises:
        TeacherUnavailable: none answers. TeacherError: they serve different models, or one refuses.
    """

    def __init__(
        self, urls: Sequence[str], connect: Callable[[str], ServerTeacher], *, patience_s: float
    ) -> None:
        self._members = [_Member(url, connect) for url in urls]
        self._patience_s, self._lock = patience_s, threading.Lock()
        try:
            for member in self._members:
                try:
                    member.connect()
                except TeacherUnavailable as error:
                    self._leave_out(member, error)
            self._check_same()
        except TeacherError:
            self.close()
            raise
        if not self._teachers:
            told = "; ".join(member.problem for member in self._members)
            raise TeacherUnavailable(f"none of {len(urls)} servers of one teacher answers: {told}")

    # -- as a server's teacher --------------------------------------------------------------------

    @property
    def context_length(self) -> int | None:
        """Tokens of a sequence at most, of the server that takes the fewest."""
        known = [one.context_length for one in self._teachers if one.context_length is not None]
        return min(known, default=None)

    def tokenize(self, text: str) -> list[int] | None:
        """See `ServerTeacher.tokenize`."""
        return self._teachers[0].tokenize(text)

    def close(self) -> None:
        """Close all connections."""
        for teacher in self._teachers:
            teacher.close()

    def describe(self) -> dict[str, Any]:
        """That of the first; all addresses; exact if all are."""
        told = [teacher.describe() for teacher in self._teachers]
        why = next((str(each["why"]) for each in told if not each["exact"]), str(told[0]["why"]))
        urls = ", ".join(member.url for member in self._members)
        return told[0] | {"url": urls, "exact": all(each["exact"] for each in told), "why": why}

    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        completion_start: Sequence[int],
        want_ids: Int[Tensor, "N W"] | None,
        top_k: int,
    ) -> TeacherScores:
        """See `Teacher.score`. Wanted ids are scored for all sequences or for none."""
        if want_ids is not None and not self.describe()["exact"]:
            want_ids = None
        wants = by_sequence(token_ids, completion_start, want_ids)
        questions = list(zip(token_ids, completion_start, wants, strict=True))
        waiting = {place: self._ask(question, top_k) for place, question in enumerate(questions)}
        found: dict[int, TeacherScores] = {}
        try:
            while waiting:
                for place, (member, future) in list(waiting.items()):
                    try:
                        found[place] = future.result()
                    except TeacherUnavailable as error:
                        self._leave_out(member, error)
                        waiting[place] = self._ask(questions[place], top_k)
                    else:
                        del waiting[place]
                        self._note_back(member)
        finally:
            for _, future in waiting.values():
                future.cancel()
        return join([found[place] for place in range(len(questions))])

    # -- which of them ----------------------------------------------------------------------------

    @property
    def _teachers(self) -> list[ServerTeacher]:
        return [member.teacher for member in self._members if member.teacher is not None]

    def _ask(self, question: Any, top_k: int) -> tuple[_Member, Future[TeacherScores]]:
        """Send a sequence to the least loaded server.

        Raises:
            TeacherUnavailable: none has answered for `patience_s`.
        """
        tokens, start, want = question
        member = self._least_loaded()
        assert member.teacher is not None
        future = member.teacher.submit(tokens, start, want, top_k)

        def done(_: Any) -> None:
            with self._lock:
                member.in_flight -= 1

        future.add_done_callback(done)
        return member, future

    def _least_loaded(self) -> _Member:
        """A server with the fewest requests, of which it now has one more."""
        began = time.monotonic()
        while True:
            self._connect_again()
            with self._lock:
                now = time.monotonic()
                loads = [(load, m) for m in self._members if (load := m.load(now)) is not None]
                if loads:
                    member = min(loads, key=lambda pair: pair[0])[1]
                    member.in_flight += 1
                    member.tried = now
                    return member
                down = [member.down_since or began for member in self._members]
            if now - max(down) >= self._patience_s:
                told = "; ".join(member.problem for member in self._members)
                raise TeacherUnavailable(
                    f"none of {len(self._members)} servers of the teacher has answered for "
                    f"{now - max(down):.0f} s (teacher_patience_s={self._patience_s:g}); last: {told}"
                )
            time.sleep(min(WAIT_S, max(0.01, self._patience_s / 10)))

    def _connect_again(self) -> None:
        """Connect a server that was away at the start, if it is time to try."""
        with self._lock:
            now = time.monotonic()
            late = [m for m in self._members if m.teacher is None and now - m.tried >= RETRY_S]
            for member in late:
                member.tried = now
        for member in late:
            # Not here: the others' answers must not wait for one that does not come.
            threading.Thread(target=self._try_to_connect, args=(member,), daemon=True).start()

    def _try_to_connect(self, member: _Member) -> None:
        try:
            member.connect()
            self._check_same()
        except TeacherError as error:
            refused, member.teacher, member.problem = member.teacher, None, str(error)
            if refused is not None:
                refused.close()
            return
        self._note_back(member)

    def _leave_out(self, member: _Member, error: TeacherError) -> None:
        with self._lock:
            first, member.problem = member.down_since is None, str(error)
            member.down_since = member.down_since or time.monotonic()
            member.tried = time.monotonic()
        if first:
            logger.warning("teacher server %s is left out: %s", member.url, error)

    def _note_back(self, member: _Member) -> None:
        with self._lock:
            was_down, member.down_since = member.down_since is not None, None
        if was_down:
            logger.warning("teacher server %s is back", member.url)

    def _check_same(self) -> None:
        told = [(one.describe(), one) for one in self._teachers]
        for about, _ in told[1:]:
            if about["model"] != told[0][0]["model"]:
                raise TeacherError(
                    f"teacher_url: {told[0][0]['url']} serves {told[0][0]['model']!r} and {about['url']} "
                    f"serves {about['model']!r}: list servers of one model"
                )
