"""A teacher behind SGLang: `/generate` with `top_logprobs_num` and `token_ids_logprob`.

SGLang scores one set of ids for a whole sequence, not one per token: the union of what is wanted along it.
Above `MOST_IDS` ids in the union of any sequence none is asked for, and the teacher's mass is a lower bound
for all.
"""

from typing import Any

import torch

from taopd.errors import TeacherError
from taopd.teachers.protocol import TeacherScores
from taopd.teachers.server import Question, ServerTeacher, number, read_scores, whole_number
from taopd.teachers.transport import Transport

MOST_IDS = 2048
"""Of a union; each costs a number at every token of the sequence."""


class SglangTeacher(ServerTeacher):
    """See the module."""

    def __init__(self, transport: Transport, *, vocab_size: int, top_k: int) -> None:
        super().__init__(transport, vocab_size=vocab_size)
        status, about = transport.get("/get_model_info")
        if status != 200 or not isinstance(about, dict):
            raise TeacherError(
                f"{transport.url}/get_model_info answers {status}: {str(about)[:300]}"
            )
        self._model = str(about.get("model_path", "unnamed"))
        self.served = (self._model,)
        self._try(Question([0, 0], 1, [[0]], top_k))

    def describe(self) -> dict[str, Any]:
        """Kind, URL, model; exact up to `MOST_IDS`."""
        why = f"a lower bound in batches with more than {MOST_IDS} wanted ids along a sequence"
        about = {"kind": "sglang", "url": self._transport.url, "model": self._model}
        return about | {"exact": True, "why": why}

    def _can_score(self, want_ids: list[list[list[int]]]) -> bool:
        return all(len({index for row in rows for index in row}) <= MOST_IDS for rows in want_ids)

    def _request(self, asked: Question) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "input_ids": asked.tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": asked.start - 1,
            "top_logprobs_num": asked.top_k,
            "return_text_in_logprobs": False,
        }
        if asked.want is not None:
            body["token_ids_logprob"] = sorted({index for row in asked.want for index in row})
        return "/generate", body

    def _read(self, document: Any, asked: Question) -> TeacherScores:
        tokens, start, want, top_k = asked
        about, count = document["meta_info"], len(tokens) - start
        names = ["input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"]
        # The first token of what was asked for has no log-prob; older versions leave its entry out.
        columns = [about[name][-count:] for name in names[: 2 if want is None else 3]]
        for name, column in zip(names, columns, strict=False):
            if len(column) != count or len(about[name]) > count + 1:
                raise TeacherError(f"{len(about[name])} entries in {name} for {count} tokens")
        if [whole_number(entry[1]) for entry in columns[0]] != tokens[start:]:
            raise TeacherError("the answer is about another sequence")
        rows = [[(whole_number(e[1]), number(e[0])) for e in entries] for entries in columns[1]]
        wanted = None
        if want is not None:
            scored = [{whole_number(e[1]): number(e[0]) for e in entries} for entries in columns[2]]
            chosen = [
                [given[index] for index in row] for given, row in zip(scored, want, strict=True)
            ]
            wanted = torch.tensor(chosen, dtype=torch.float32)
        return read_scores([number(e[0]) for e in columns[0]], rows, wanted, top_k)
