"""1,000 answers, malformed, cut, slow, duplicated or lying: an error or the truth, never a wrong number.

Oracle: the model's own scores. What is changed contradicts something that the answer itself, the request or
the vocabulary says; a lie that agrees with itself, as another model's answer would, only `taopd check` can
see.

The suite draws 50; all of them: TAOPD_FUZZ=1000 python -m pytest -s tests/unit/test_teacher_fuzz.py
"""

import base64
import copy
import io
import json
import os
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from taopd.errors import TeacherError
from taopd.teachers import LocalTeacher, connect, transport
from tests import scripted_server as scripted
from tests.scripted_server import ScriptedServer

VOCAB, K = 40, 5
EXAMPLES = int(os.environ.get("TAOPD_FUZZ", "50"))
TIMEOUT_S, PATIENCE_S = 0.15, 0.15
HANG_S = 30.0
"""No call may take longer: three reads of at most a time-out and the patience each, on a busy machine."""
SEQUENCES, STARTS = [[5, 14, 6, 15, 8, 2], [1, 7, 9]], [4, 1]
WANT = torch.randint(0, VOCAB, (4, 3), generator=torch.Generator().manual_seed(1))
JUNK = [None, True, -1, 0.25, 10**30, "x", "", [], {}, [[]], [None], {"logprob": -1.0}]
NOT_LOGPROBS = [None, "-0.5", True, [], {}, float("nan"), -float("inf"), 10**400, 0.5, 3.0, 1e300]
NOT_IDS = [None, "x", -1, VOCAB, 2**31, 10**30, 1.5, True]
BEHAVIOURS = {
    "cut": lambda share: scripted.cut(share),
    "slow": lambda share: scripted.slow(TIMEOUT_S + share),
    "drip": lambda share: scripted.drip(0.01 + 0.05 * share, headers=share > 0.5),
    "hang up": lambda share: scripted.hang_up,
    "status": lambda share: scripted.status([400, 404, 429, 500, 503][int(4 * share)]),
    "no JSON": lambda share: scripted.body(
        [b"", b"<html>", b"{", b"[" * 9999, b"\xff"][int(4 * share)]
    ),
}


@pytest.fixture(scope="module")
def model(micro_lab):
    return AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def servers(model):
    """Name -> (server, its teacher), with waits and time-outs that let a thousand answers go wrong."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "FIRST_WAIT_S", 0.001)
        for name in ("vllm", "vllm exact", "sglang"):
            server = ScriptedServer(model, name.partition(" ")[0], exact="exact" in name)
            server.start()
            teacher = connect(server.url, vocab_size=VOCAB, top_k=K, patience_s=PATIENCE_S)
            teacher._transport._timeout_s = TIMEOUT_S
            found[name] = server, teacher
        yield found
    for server, teacher in found.values():
        teacher.close()
        server.stop()


@pytest.fixture(scope="module")
def truth(model):
    return LocalTeacher(model, VOCAB).score(SEQUENCES, STARTS, WANT, K)


def nodes(value, path=()):
    """Paths of everything inside a document."""
    if not isinstance(value, (dict, list)):
        return []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    return [p for key, child in items for p in ((*path, key), *nodes(child, (*path, key)))]


def parent(document, path):
    for key in path[:-1]:
        document = document[key]
    return document


def rows_of(answer):
    """The last token's entries: (vLLM's dictionary or SGLang's list, where a log-prob is, where an id)."""
    if "meta_info" in answer:
        return answer["meta_info"]["input_top_logprobs"][-1], 0, 1
    holder = answer if "prompt_token_id_logprobs" in answer else answer["choices"][0]
    return holder["prompt_logprobs"][-1], "logprob", None


def remove(answer, rng):
    path = rng.choice(nodes(answer))
    del parent(answer, path)[path[-1]]


def replace_by_junk(answer, rng):
    path = rng.choice(nodes(answer))
    # A log-prob that is merely another one is no contradiction, so junk numbers go where no number belongs.
    old = parent(answer, path)[path[-1]]
    fits = [junk for junk in JUNK if not (isinstance(old, float) and junk in (-1, 0.25))]
    parent(answer, path)[path[-1]] = rng.choice(fits)


def repeat(answer, rng):
    path = rng.choice([p for p in nodes(answer) if isinstance(p[-1], int)])
    parent(answer, path).insert(path[-1], copy.deepcopy(parent(answer, path)[path[-1]]))


def not_a_logprob(answer, rng):
    entries, logprob, _ = rows_of(answer)
    chosen = rng.choice(list(entries.values()) if isinstance(entries, dict) else entries)
    chosen[logprob] = rng.choice(NOT_LOGPROBS)


def not_an_id(answer, rng):
    entries, _, place = rows_of(answer)
    bad = rng.choice(NOT_IDS)
    if place is None:
        entries[str(bad)] = entries.pop(rng.choice(list(entries)))
    else:
        rng.choice(entries)[place] = bad


def swap_best_and_last(answer, rng):
    entries, logprob, _ = rows_of(answer)
    chosen = list(entries.values()) if isinstance(entries, dict) else entries
    listed = sorted(chosen, key=lambda e: e.get("rank", 0) if isinstance(e, dict) else 0)[:K]
    first, last = listed[0], listed[-1]
    first[logprob], last[logprob] = last[logprob], first[logprob]


def too_much_mass(answer, rng):
    entries, logprob, _ = rows_of(answer)
    for entry in entries.values() if isinstance(entries, dict) else entries:
        entry[logprob] = rng.uniform(-1.2, 0.0)


def contradict_the_list(answer, rng):
    """Of the sampled token or a wanted id: another number than the list's, or a better one than its last."""
    change = rng.choice([-0.05, 0.05]) * rng.uniform(1, 40)
    if "prompt_token_id_logprobs" in answer:
        values = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
        rows = answer["prompt_logprobs"][-len(values) :]
        best = [max(entry["logprob"] for entry in row.values()) for row in rows]
        better = np.broadcast_to(np.array(best, "f4")[:, None] + abs(change), values.shape)
        values = rng.choice([better, values[:-1], values[:, :0], values.astype("i4")])
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        answer["prompt_token_id_logprobs"] = base64.b64encode(file.getvalue()).decode()
    elif "meta_info" in answer:
        column = rng.choice(["input_token_logprobs", "input_token_ids_logprobs"])
        entry = answer["meta_info"][column][-1]
        entry = entry[-1] if isinstance(entry[0], list) else entry
        listed = {index: value for value, index, _ in answer["meta_info"]["input_top_logprobs"][-1]}
        entry[0] = listed.get(entry[1], min(listed.values()) + 2 * abs(change)) + change
    else:
        row = answer["choices"][0]["prompt_logprobs"][-1]
        rng.choice(list(row.values()))["rank"] = rng.choice([K + 9, -1, 0.5, "1", None])


MUTATIONS = [
    contradict_the_list,
    remove,
    replace_by_junk,
    repeat,
    not_a_logprob,
    not_an_id,
    swap_best_and_last,
    too_much_mass,
]


def answer_or_error(teacher):
    """Scores, or the TeacherError; fails on any other exception and on a hang."""
    outcome: list = []

    def run():
        try:
            outcome.append(teacher.score(SEQUENCES, STARTS, WANT, K))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert outcome, "hangs"
    if isinstance(outcome[0], BaseException) and not isinstance(outcome[0], TeacherError):
        raise outcome[0]
    return outcome[0]


SEEN: Counter = Counter()


@settings(
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    derandomize=EXAMPLES == 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(["vllm", "vllm exact", "sglang"]),
    how=st.sampled_from([*MUTATIONS, "stale", *BEHAVIOURS]),
    seed=st.integers(0, 2**32),
    times=st.sampled_from([1, 100, 100]),
)
def test_an_error_or_the_truth(servers, truth, name, how, seed, times):
    server, teacher = servers[name]
    server.script.clear()
    server.tamper, teacher._transport._failures = None, 0
    left = [times]

    def some(change):
        """Of the first `times` answers."""

        def tamper(answer):
            with server.lock:
                left[0] -= 1
                mine = left[0] >= 0
            return change(answer) if mine else answer

        return tamper

    if how in BEHAVIOURS:
        server.script.extend([BEHAVIOURS[how](random.Random(seed).random())] * times)
    elif how == "stale":
        server.tamper = some(lambda answer, kept=[]: kept.append(answer) or kept[0])
    else:
        server.tamper = some(lambda answer: how(answer, random.Random(seed)) or answer)
    outcome = answer_or_error(teacher)
    kind = how if isinstance(how, str) else how.__name__
    if isinstance(outcome, TeacherError):
        assert server.url in str(outcome), outcome
        SEEN[kind, "error"] += 1
        return
    SEEN[kind, "truth"] += 1
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(outcome.logprobs, truth.logprobs, **close)
    assert torch.equal(outcome.topk_ids, truth.topk_ids)
    torch.testing.assert_close(outcome.topk_logprobs, truth.topk_logprobs, **close)
    assert outcome.exact == (name != "vllm")
    if outcome.exact:
        torch.testing.assert_close(outcome.want_logprobs, truth.want_logprobs, **close)


def test_both_outcomes_were_seen():
    """Runs after the fuzzing: neither errors alone nor repaired answers alone."""
    seen = {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(SEEN.items())}
    print(f"\n{json.dumps(seen)}")
    assert sum(n for (_, outcome), n in SEEN.items() if outcome == "error") > EXAMPLES / 5
    assert sum(n for (_, outcome), n in SEEN.items() if outcome == "truth") > EXAMPLES / 20
