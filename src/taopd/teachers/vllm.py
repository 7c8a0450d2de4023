"""A teacher behind vLLM.

Log-probs of the sampled token and of the teacher's own list come from `prompt_logprobs` of `/v1/completions`.
Log-probs of wanted ids come from `prompt_logprob_token_ids` of `/inference/v1/generate`, which vLLM 0.32 has
with `--enable-scale-out` and its second model runner; one small request finds out.
"""

import base64
import re
from typing import Any

import numpy as np
import torch

from taopd.errors import TeacherError
from taopd.teachers.protocol import TeacherScores
from taopd.teachers.server import (
    MALFORMED,
    Question,
    ServerTeacher,
    last_part,
    number,
    read_scores,
    whole_number,
)
from taopd.teachers.transport import Transport, refusal

SAMPLING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
"""The server insists on a token of its own."""
COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"


class VllmTeacher(ServerTeacher):
    """See the module.

    Args:
        top_k: what the server is tried with, so that it refuses now what it would refuse later.
    """

    def __init__(self, transport: Transport, *, vocab_size: int, top_k: int) -> None:
        super().__init__(transport, vocab_size=vocab_size)
        status, models = transport.get("/v1/models")
        if status != 200:
            raise TeacherError(f"{transport.url}/v1/models {refusal(status, models)}")
        _, version = transport.get("/version")
        try:
            served = models["data"][0]
            self._model, self._version = _name(served["id"]), str(version["version"])
            limit = served.get("max_model_len")
            self.context_length = (
                None
                if limit is None
                else whole_number(limit, "context length (max_model_len)") or None
            )
            self.served = (self._model, *([str(served["root"])] if served.get("root") else ()))
        except MALFORMED as error:
            raise TeacherError(
                f"{transport.url} does not answer /v1/models and /version as vLLM does ({error}): "
                f"{str(models)[:300]}"
            ) from error
        self._try(Question([0, 0], 1, None, top_k))
        self._why = ""
        try:
            self._try(Question([0, 0, 0], 1, [list(range(top_k))] * 2, top_k))
        except TeacherError as error:
            self._why = str(error)

    def tokenize(self, text: str) -> list[int] | None:
        """See `ServerTeacher.tokenize`."""
        asked = {"model": self._model, "prompt": text, "add_special_tokens": False}
        status, answer = self._transport.post("/tokenize", asked)
        try:
            return [whole_number(index) for index in answer["tokens"]] if status == 200 else None
        except MALFORMED:
            return None

    def describe(self) -> dict[str, Any]:
        """Kind, URL, version, model; `exact`, and why not."""
        about = {"kind": "vllm", "url": self._transport.url, "version": self._version}
        return about | {"model": self._model, "exact": not self._why, "why": self._why}

    def _can_score(self, want_ids: list[list[list[int]]]) -> bool:
        return not self._why

    def _request(self, asked: Question) -> tuple[str, dict[str, Any]]:
        tokens, start, want, top_k = asked
        body: dict[str, Any] = {"model": self._model, "return_token_ids": True}
        if want is None:
            return COMPLETIONS, body | {"prompt": tokens, "prompt_logprobs": top_k} | SAMPLING
        scored = {"prompt_logprob_token_ids": want, "prompt_logprob_start": start - 1}
        sampling = SAMPLING | {"prompt_logprobs": top_k} | scored
        return GENERATE, body | {"token_ids": tokens, "sampling_params": sampling}

    def _read(self, document: Any, asked: Question) -> TeacherScores:
        tokens, start, want, top_k = asked
        holder = document["choices"][0] if want is None else document
        named = document.get("model")
        # Behind one address may be several servers, of which one was started with another model.
        if named is not None and last_part(_name(named)) not in map(last_part, self.served):
            raise TeacherError(
                f"the answer is of the model {named!r}, and {self._model!r} was asked"
            )
        if holder["prompt_token_ids"] != tokens:
            raise TeacherError("the answer is about another sequence")
        given = holder["prompt_logprobs"]
        if len(given) != len(tokens):
            raise TeacherError(f"{len(given)} entries for {len(tokens)} tokens")
        sampled, rows = [], []
        for token, entries in zip(tokens[start:], given[start:], strict=True):
            sampled.append(number(entries[str(token)]["logprob"]))
            ranked = sorted(
                (
                    whole_number(entry["rank"], "rank"),
                    whole_number(int(key)),
                    number(entry["logprob"]),
                )
                for key, entry in entries.items()
            )
            rows.append([(key, logprob) for rank, key, logprob in ranked if rank <= top_k])
        wanted = None if want is None else _wanted(document, len(want), len(want[0]))
        return read_scores(sampled, rows, wanted, top_k)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no model's name")
    return value


# Read by hand: NumPy's reader sets aside whatever memory a header asks for, and ends in a dozen ways.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f([248])', 'fortran_order': False, 'shape': \((\d+), (\d+)\), \} *\n",
    re.DOTALL,
)


def _wanted(document: Any, num_rows: int, num_ids: int) -> torch.Tensor:
    """[rows, ids] from the `.npy` file, in base64, that the server puts into its answer."""
    packed = base64.b64decode(document["prompt_token_id_logprobs"], validate=True)
    header = _NPY.match(packed)
    if header is None:
        raise ValueError("no .npy file of a table of floats")
    size, *shape = map(int, header.groups())
    if shape != [num_rows, num_ids]:
        raise ValueError(f"a table {shape} in place of {[num_rows, num_ids]}")
    values = np.frombuffer(packed[header.end() :], f"<f{size}")
    return torch.from_numpy(values.reshape(shape).astype(np.float32))
