"""Answers of servers that are well-formed and wrong: of another model, an error under status 200, no key.

Each is refused in one message that names the address and what the server said.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd.errors import TeacherError
from taopd.teachers import connect, transport
from tests.scripted_server import ScriptedServer

SETTINGS = {"vocab_size": 40, "top_k": 5, "timeout_s": 5.0, "patience_s": 1.0}


@pytest.fixture(scope="module")
def model(micro_lab):
    return AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()


@pytest.fixture(params=["bound", "exact"])
def server(request, model, monkeypatch):
    monkeypatch.setattr(transport, "FIRST_WAIT_S", 0.01)
    with ScriptedServer(model, exact=request.param == "exact") as running:
        yield running


def score(teacher, server):
    """One question, with ids that are wanted where the server gives them."""
    want = torch.tensor([[1, 2], [3, 4]]) if server.exact else None
    try:
        return teacher.score([[5, 6, 7]], [1], want, 5)
    finally:
        teacher.close()


def named(name):
    return lambda answer: answer | {"model": name}


def test_an_answer_of_another_model_is_refused(server):
    teacher = connect(server.url, **SETTINGS)
    server.tamper = named("another/gpt-9")
    with pytest.raises(
        TeacherError, match=r"'another/gpt-9', and 'tiny-teacher' was asked"
    ) as error:
        score(teacher, server)
    assert server.url in str(error.value)


@pytest.mark.parametrize("name", ["tiny-teacher", "owner/Tiny-Teacher", "/models/tiny-teacher/"])
def test_an_answer_of_the_model_that_was_asked_is_taken(server, name):
    teacher = connect(server.url, **SETTINGS)
    server.tamper = named(name)
    assert len(score(teacher, server).logprobs) == 2


@pytest.mark.parametrize(
    "said",
    [
        {"error": {"message": "CUDA out of memory"}},
        {"object": "error", "message": "CUDA out of memory", "code": 400},
        {"detail": "CUDA out of memory"},
    ],
    ids=["error", "vLLM before 0.10", "detail"],
)
def test_an_error_under_status_200_is_told_in_the_servers_words(server, said):
    teacher = connect(server.url, **SETTINGS)
    server.tamper = lambda answer: said
    with pytest.raises(TeacherError, match=r"malformed answer .*which says: .*CUDA out of memory"):
        score(teacher, server)


def served(**changes):
    return {"data": [{"id": "tiny-teacher", "max_model_len": 64} | changes]}


@pytest.mark.parametrize(
    "document",
    [
        {"data": []},
        {"data": "abc"},
        [1],
        served(id=None),
        served(id=""),
        served(id=7),
        served(max_model_len="64"),
        served(max_model_len=-1),
        served(max_model_len=[64]),
        served(max_model_len=True),
    ],
    ids=str,
)
def test_a_list_of_models_that_is_none_is_refused(model, document):
    with ScriptedServer(model) as server:
        usual = server.get
        server.get = lambda path: document if path == "/v1/models" else usual(path)
        with pytest.raises(
            TeacherError, match="does not answer /v1/models and /version as vLLM"
        ) as error:
            connect(server.url, **SETTINGS)
        assert server.url in str(error.value)
        if "id" in str(document) and document["data"][0]["max_model_len"] != 64:
            assert "is not a context length (max_model_len)" in str(error.value)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("path", ["/version", "/v1/models", "/v1/completions"])
def test_a_server_that_asks_for_a_key_is_told_where_it_belongs(model, status, path, monkeypatch):
    """vLLM guards what lies under /v1, a proxy everything."""
    from tests.scripted_server import Handler

    def refusing(usual):
        def answer(handler):
            if handler.path == path or (path == "/version" and handler.path == "/get_model_info"):
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                handler.send_bytes(status, b'{"error": "Unauthorized"}')
            else:
                usual(handler)

        return answer

    for method in ("do_GET", "do_POST"):
        monkeypatch.setattr(Handler, method, refusing(getattr(Handler, method)))
    with ScriptedServer(model) as server, pytest.raises(TeacherError) as error:
        connect(server.url, **SETTINGS)
    assert f"{status}" in str(error.value) and "TAOPD_TEACHER_KEY" in str(error.value)
    assert path in str(error.value) and server.url in str(error.value)
