"""Valid inputs that the fuzzers change: a bank, gains, run folders, servers' answers."""

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from taopd.runs.checkpoints import OPTIMIZER, seal
from taopd.runs.jsonl import write_json
from tests.browser import synthetic
from tests.conftest import make_model, make_rows, make_tokenizer

PROMPTS = [row["prompt"] for row in make_rows(3, "train")]


def make_bank(folder: Path) -> Path:
    """A bank of four completions."""
    from taopd.diagnose.bank import FixedContextBank, sample_rollouts

    student, teacher = make_model(seed=0), make_model(seed=1, hidden_size=32)
    tokenizer = make_tokenizer()
    rollouts = sample_rollouts(student, tokenizer, PROMPTS, num_completions=4, max_tokens=5)
    return FixedContextBank.freeze(student, teacher, tokenizer, rollouts, folder, k=(2, 4)).folder


def make_gains(folder: Path) -> Path:
    """The gains of one checkpoint on such a bank."""
    from taopd.diagnose.bank import FixedContextBank
    from taopd.diagnose.gain import measure_gains
    from taopd.diagnose.gain_files import write_gains

    bank = FixedContextBank.open(make_bank(folder.with_name(f"{folder.name}-bank")))
    checkpoint = folder.with_name("checkpoint-7")
    make_model(seed=5).save_pretrained(checkpoint)
    make_tokenizer().save_pretrained(checkpoint)
    gains = measure_gains(bank, [checkpoint], make_model(seed=1, hidden_size=32))
    return write_gains(gains, bank, folder)


def make_runs(root: Path) -> list[Path]:
    """A run with a checkpoint, and a study whose arms are runs."""
    from taopd.experiments.study.analysis import Question

    lines = [synthetic.rollout(np.random.default_rng(step), 6, step=step, k=4) for step in range(3)]
    run = synthetic.write_run(root / "run", lines, steps=4)
    _checkpoint(run)
    study = synthetic.write_study(root / "study")
    outcomes = json.loads((study / "results.json").read_text())["arms"]
    for row in outcomes[:4]:
        arm = synthetic.write_run(study / "arms" / f"{row['name']}-seed{row['seed']}", lines[:1])
        write_json(arm / "results.json", _outcome(row))
        write_json(
            arm / "arm.json", {"seed": row["seed"], "match": "exact", "config": {"budget": 1}}
        )
    controls = {row["name"]: {"full": None, "random": None} for row in outcomes}
    question = {name: getattr(Question(), name) for name in Question.__dataclass_fields__}
    write_json(study / "config.json", {"question": question, "controls": controls})
    _checkpoint(study)
    return [run, study]


def _outcome(row: dict[str, Any]) -> dict[str, Any]:
    curve = row["accuracy_curve"]
    return row | {
        "loss": "reverse_kl",
        "accuracy_sampled_curve": curve,
        "train_seconds": 2.0,
        "train_seconds_curve": [[step, step / 10] for step, _ in curve],
        "selected_tokens": 20,
        "selected_tokens_curve": [[step, step] for step, _ in curve],
        "prompt_digests": [[step, "d"] for step, _ in curve],
        "steps": 20,
        "stopped_by": "max_steps",
        "selected_share_by_kind": {"digit": 1.0},
    }


def _checkpoint(folder: Path) -> None:
    write_json(folder / ".taopd-run", {"taopd": "0"})
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    write_json(checkpoint / "trainer_state.json", {"global_step": 2, "log_history": []})
    (checkpoint / OPTIMIZER).write_bytes(b"")
    seal(checkpoint, step=2, num_processes=1)


class Server:
    """Stands where a `Transport` stands: answers from a table, damaged on request."""

    url = "http://fuzz"

    def __init__(self, pages: dict[str, Any], answers: dict[str, Any]) -> None:
        self._pages, self._answers = pages, answers
        self.damage: Callable[[Any], Any] = lambda answer: answer

    def get(self, path: str) -> tuple[int, Any]:
        """What a page says."""
        return (200, self._pages[path]) if path in self._pages else (404, {"error": "no"})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The answer to a probe."""
        return (200, self._answer(path, body)) if path in self._answers else (404, {"error": "no"})

    def submit(
        self, path: str, body: dict[str, Any], read: Callable[[Any], Any], **_: Any
    ) -> Future[Any]:
        """What is read of the damaged answer, as JSON brings it."""
        done: Future[Any] = Future()
        try:
            answer = self.damage(self._answer(path, body))
            done.set_result(read(json.loads(json.dumps(answer, default=str))))
        except Exception as error:
            done.set_exception(error)
        return done

    def _answer(self, path: str, body: dict[str, Any]) -> Any:
        return self._answers[path](body)


VOCABULARY, TOKENS, START, TOP_K = 8, [1, 2, 3, 4, 5], 2, 3
_LOGPROBS = [-0.2, -1.9, -4.0]


def _list_of(token: int) -> list[tuple[int, float]]:
    """A token's list: itself first."""
    return [((token + place) % VOCABULARY, value) for place, value in enumerate(_LOGPROBS)]


def _sglang_answer(body: dict[str, Any]) -> Any:
    tokens = body["input_ids"][body["logprob_start_len"] + 1 :]
    ids = body.get("token_ids_logprob", [])
    table = [dict(_list_of(token)) for token in tokens]
    meta: dict[str, Any] = {
        "input_token_logprobs": [[_LOGPROBS[0], token, None] for token in tokens],
        "input_top_logprobs": [[[p, t, None] for t, p in _list_of(token)] for token in tokens],
    }
    if ids:
        meta["input_token_ids_logprobs"] = [
            [[row.get(index, -9.0), index, None] for index in ids] for row in table
        ]
    return {"text": "", "meta_info": meta}


def sglang_teacher() -> tuple[Any, Server, Callable[[], Any]]:
    """Teacher, server, and a call that scores one sequence with wanted ids."""
    from taopd.teachers import SglangTeacher

    server = Server({"/get_model_info": {"model_path": "m"}}, {"/generate": _sglang_answer})
    return _teacher(SglangTeacher, server, want=True)


def _vllm_prompt(tokens: list[int]) -> list[Any]:
    return [None] + [
        {
            str(t): {"logprob": p, "rank": place + 1, "decoded_token": "x"}
            for place, (t, p) in enumerate(_list_of(token))
        }
        for token in tokens[1:]
    ]


def _vllm_completion(body: dict[str, Any]) -> Any:
    tokens = body["prompt"]
    return {"choices": [{"prompt_token_ids": tokens, "prompt_logprobs": _vllm_prompt(tokens)}]}


def _vllm_generate(body: dict[str, Any]) -> Any:
    tokens, sampling = body["token_ids"], body["sampling_params"]
    start = sampling["prompt_logprob_start"] + 1
    wanted = [
        [dict(_list_of(token)).get(index, -9.0) for index in row]
        for token, row in zip(tokens[start:], sampling["prompt_logprob_token_ids"], strict=True)
    ]
    file = io.BytesIO()
    np.save(file, np.array(wanted, np.float32), allow_pickle=False)
    packed = base64.b64encode(file.getvalue()).decode()
    answer = {"prompt_token_ids": tokens, "prompt_logprobs": _vllm_prompt(tokens)}
    return answer | {"prompt_token_id_logprobs": packed}


def vllm_teacher(*, exact: bool) -> tuple[Any, Server, Callable[[], Any]]:
    """Teacher, server, and a call that scores one sequence; `exact`: with wanted ids."""
    from taopd.teachers import VllmTeacher

    pages = {"/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "0"}}
    answers: dict[str, Any] = {"/v1/completions": _vllm_completion}
    if exact:
        answers["/inference/v1/generate"] = _vllm_generate
    return _teacher(VllmTeacher, Server(pages, answers), want=exact)


def _teacher(kind: Any, server: Server, *, want: bool) -> tuple[Any, Server, Callable[[], Any]]:
    import torch

    made = kind(server, vocab_size=VOCABULARY, top_k=TOP_K)
    if made.describe()["exact"] != want:
        raise AssertionError(f"the seed answer is not read as it should be: {made.describe()}")
    wanted = torch.tensor([[3, 4], [4, 0], [6, 5]]) if want else None
    return made, server, lambda: made.score([TOKENS], [START], wanted, TOP_K)
