"""Connection to a teacher server: detects its kind (vLLM or SGLang)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from taopd.errors import TeacherError, require_known
from taopd.teachers.addresses import check_address
from taopd.teachers.server import ServerTeacher, last_part
from taopd.teachers.sglang import SglangTeacher
from taopd.teachers.teacher_pool import TeacherPool
from taopd.teachers.transport import Transport, key_hint
from taopd.teachers.vllm import VllmTeacher

KINDS: dict[str, type[VllmTeacher] | type[SglangTeacher]] = {
    "vllm": VllmTeacher,
    "sglang": SglangTeacher,
}
TELLING = {"vllm": "/version", "sglang": "/get_model_info"}
"""A path that only this server has."""


def connect(
    url: str,
    *,
    vocab_size: int,
    top_k: int,
    kind: str = "auto",
    concurrency: int = 32,
    timeout_s: float = 120.0,
    patience_s: float = 600.0,
    model: str | None = None,
) -> ServerTeacher:
    """The teacher at a URL, after one probe request that shows what the server supports.

    Args:
        vocab_size: ids that the teacher knows.
        top_k: entries of its list that will be asked for.
        kind: "vllm", "sglang", or "auto" to find out.
        concurrency: requests in flight at most.
        timeout_s: seconds for one request.
        patience_s: seconds that the server may stay away, later.
        model: the one that it should serve, a name or path; None: whichever it serves.

    Raises:
        TeacherUnavailable: nobody answers. TeacherError: the server is none of these, refuses, or serves
            another model.
        ConfigError: an unknown kind, what is not a URL, one with a password, or a key that no header
            can hold.
    """
    require_known("teacher_server", kind, (*KINDS, "auto"))
    check_address(url)
    transport = Transport(url, timeout_s=timeout_s, patience_s=patience_s, connections=concurrency)
    try:
        kind = _kind(transport) if kind == "auto" else kind
        teacher = KINDS[kind](transport, vocab_size=vocab_size, top_k=top_k)
    except TeacherError as error:
        transport.close()
        advice = f"Is the server of teacher_url={url!r} up, and is it vLLM or SGLang?"
        raise type(error)(f"{error}. {advice}") from error
    if model is not None and last_part(model) not in map(last_part, teacher.served):
        transport.close()
        raise TeacherError(
            f"the server of teacher_url={url!r} serves {' = '.join(map(repr, teacher.served))}, and "
            f"teacher_model_name_or_path is {model!r}: serve that one, or name the one that is served (vLLM: "
            "--served-model-name gives a model the name that you like)"
        )
    return teacher


def connect_all(urls: Sequence[str], *, patience_s: float, **options: Any) -> TeacherPool:
    """The teacher behind several addresses; see `connect` and `TeacherPool`."""
    # A server that fails is left at once for the others; their patience is the pool's.
    connect_one = partial(connect, patience_s=0.0, **options)
    return TeacherPool(urls, connect_one, patience_s=patience_s)


def _kind(transport: Transport) -> str:
    answers = {name: transport.get(path)[0] for name, path in TELLING.items()}
    for name, status in answers.items():
        if status == 200:
            return name
    told = ", ".join(
        f"{TELLING[name]} answers {status}{key_hint(status)}" for name, status in answers.items()
    )
    raise TeacherError(f"{transport.url} is neither vLLM nor SGLang: {told}")
