"""A teacher's server for tests, on loopback: a real model's numbers in the shapes of vLLM and SGLang.

The numbers are log-softmax of the model's logits, computed here and not by `taopd.teachers`. It misbehaves
on demand; `tests/server` compares the shape with a running vLLM.
"""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

Behaviour = Callable[["Handler", bytes], None]
"""Sends what it likes in place of an answer."""


class ScriptedServer:
    """One model behind HTTP; a context manager.

    Args:
        kind: "vllm" or "sglang".
        exact: vLLM only: answers `/inference/v1/generate` as a server with the second model runner.
    """

    def __init__(self, model, kind: str = "vllm", *, exact: bool = False) -> None:
        self.model, self.kind, self.exact = model.eval(), kind, exact
        self.name = "tiny-teacher"
        self.script: deque[Behaviour | None] = deque()
        """What happens to the next scoring requests; None, or the end of it: an answer."""
        self.always: Behaviour | None = None
        """What happens to the requests after the script."""
        self.tamper: Callable[[Any], Any] | None = None
        """Changes the document of an answer."""
        self.answered = 0
        self.spans: list[tuple[float, float]] = []
        """When each answer was begun and sent, monotonic seconds."""
        self.max_logprobs = 20
        self.lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "ScriptedServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        handler = type("Bound", (Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and drop the connections, as a killed server does."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            server.drop()

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[T, V]: row t is the distribution that predicts token t; row 0 is NaN."""
        with self.lock:
            logits = self.model(input_ids=torch.tensor([tokens])).logits[0].float()
        first = torch.full_like(logits[:1], torch.nan)
        return torch.cat([first, logits[:-1].log_softmax(-1)])

    def get(self, path: str) -> Any:
        """The document at a path, or None."""
        if self.kind == "vllm":
            served = {"id": self.name, "object": "model", "max_model_len": 64}
            if self.model.name_or_path:
                served["root"] = self.model.name_or_path
            known = {
                "/v1/models": {"object": "list", "data": [served]},
                "/version": {"version": "0"},
            }
        else:
            folder = self.model.name_or_path or self.name
            known = {"/get_model_info": {"model_path": folder, "is_generation": True}}
        return known.get(path)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and document of a scoring request."""
        if self.kind == "sglang":
            return (
                (200, self._sglang(body)) if path == "/generate" else (404, {"detail": "Not Found"})
            )
        if path == "/inference/v1/generate" and self.exact:
            return 200, self._vllm_exact(body)
        if path != "/v1/completions":
            return 404, {"error": {"message": "Not Found", "code": 404}}
        if body["prompt_logprobs"] > self.max_logprobs:
            return 400, {
                "error": {"message": f"Requested prompt logprobs of {body['prompt_logprobs']}"}
            }
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "length",
            "prompt_logprobs": self._vllm_lists(body["prompt"], body["prompt_logprobs"]),
            "prompt_token_ids": body["prompt"],
        }
        return 200, {"id": "cmpl-0", "object": "text_completion", "choices": [choice]}

    def _vllm_lists(self, tokens: list[int], k: int) -> list[Any]:
        out: list[Any] = [None]
        for token, row in zip(tokens[1:], self.logprobs(tokens)[1:], strict=True):
            values, ids = row.topk(k)
            entries = {token: (float(row[token]), int((row >= row[token]).sum()))}
            entries |= {
                int(index): (float(value), place + 1)
                for place, (value, index) in enumerate(zip(values, ids, strict=True))
            }
            out.append(
                {
                    str(index): {"logprob": value, "rank": rank, "decoded_token": f"w{index}"}
                    for index, (value, rank) in entries.items()
                }
            )
        return out

    def _vllm_exact(self, body: Any) -> Any:
        tokens, sampling = body["token_ids"], body["sampling_params"]
        want = torch.tensor(sampling["prompt_logprob_token_ids"])
        rows = self.logprobs(tokens)[sampling["prompt_logprob_start"] + 1 :]
        file = io.BytesIO()
        np.save(file, rows.gather(1, want).numpy(), allow_pickle=False)
        return {
            "request_id": "0",
            "choices": [{"index": 0, "token_ids": [0]}],
            "prompt_logprobs": self._vllm_lists(tokens, sampling["prompt_logprobs"]),
            "prompt_token_ids": tokens if body.get("return_token_ids") else None,
            "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(),
        }

    def _sglang(self, body: Any) -> Any:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        rows, k = self.logprobs(tokens)[start + 1 :], body["top_logprobs_num"]
        sampled = [[None, tokens[start], None]]
        tops: list[Any] = [None]
        wanted: list[Any] = [None]
        for token, row in zip(tokens[start + 1 :], rows, strict=True):
            sampled.append([float(row[token]), token, None])
            values, ids = row.topk(k)
            tops.append([[float(v), int(i), None] for v, i in zip(values, ids, strict=True)])
            wanted.append([[float(row[i]), i, None] for i in body.get("token_ids_logprob") or []])
        about = {"input_token_logprobs": sampled, "input_top_logprobs": tops}
        if body.get("token_ids_logprob"):
            about["input_token_ids_logprobs"] = wanted
        return {"text": "", "output_ids": [0], "meta_info": about}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128  # Of the library's 5, connections are reset where many come at once.

    def __init__(self, *args: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def drop(self) -> None:
        for request in list(self.open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive as real servers do."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Else every answer waits 40 ms for an acknowledgement.
    owner: ScriptedServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        document = self.owner.get(self.path)
        self.send_json(200 if document is not None else 404, document or {"detail": "Not Found"})

    def do_POST(self) -> None:
        owner, began = self.owner, time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            behaviour = owner.script.popleft() if owner.script else owner.always
        status, document = owner.post(self.path, body)
        if owner.tamper is not None and status == 200:
            document = owner.tamper(document)
        if behaviour is not None:
            behaviour(self, json.dumps(document).encode())
            return
        owner.answered += status == 200  # before the client can look
        self.send_json(status, document)
        owner.spans.append((began, time.monotonic()))

    def send_json(self, status: int, document: Any) -> None:
        self.send_bytes(status, json.dumps(document).encode())

    def send_bytes(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def status(code: int, text: bytes = b'{"error": {"message": "scripted"}}') -> Behaviour:
    """Answers with this status."""
    return lambda handler, _: handler.send_bytes(code, text)


def body(text: bytes) -> Behaviour:
    """Answers 200 with this body."""
    return status(200, text)


def slow(seconds: float) -> Behaviour:
    """Sleeps, then answers."""

    def behave(handler: Handler, answer: bytes) -> None:
        time.sleep(seconds)
        handler.send_bytes(200, answer)

    return behave


def drip(interval: float, *, headers: bool = False) -> Behaviour:
    """Sends a byte every so many seconds, of the body or already of the headers, without an end."""

    def behave(handler: Handler, answer: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        if not headers:
            handler.wfile.write(b"Content-Length: 100000\r\n\r\n")
        for _ in range(2000):
            handler.wfile.write(b"a")
            time.sleep(interval)

    return behave


def cut(share: float) -> Behaviour:
    """Hangs up after this share of the answer's body."""

    def behave(handler: Handler, answer: bytes) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer[: int(share * len(answer))])

    return behave


def hang_up(handler: Handler, answer: bytes) -> None:
    """Closes the connection without a byte."""
    handler.close_connection = True
