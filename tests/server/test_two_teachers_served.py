"""A teacher in this process and one behind a real vLLM, each with a prompt of its own, in one run.

Oracle: each teacher alone, connected or loaded by itself, over its own rows only; loss and weights written
out here. This vLLM sends its own list only, so that C is the bound for both.
"""

import json
from functools import partial

import pytest
import torch

from taopd.models.batch import Positions
from taopd.models.prompts import load_prompts
from taopd.signals.types import concatenate
from taopd.teachers import connect, score_remote
from tests.conftest import run_script
from tests.e2e.test_ranks import ANCHORED, SPREAD, WORKER, by_rank, places
from tests.e2e.test_trainer import weights_of
from tests.e2e.test_two_teachers import counted, normalized, trained
from tests.server.test_vllm import TIE, VOCAB, K, Listing, make_trainer
from tests.unit.test_teacher_servers import forward

NAMES = ("here", "served")
SEES_MORE = {"teacher_prompt_template": "7 + {prompt}"}
SETTINGS = SEES_MORE | {"method": "published", "per_device_train_batch_size": 8, "max_steps": 4}


def rows_of(lab):
    """Two of three prompts are the server's."""
    rows = load_prompts(str(lab.prompts), split="train")
    return rows.add_column("teacher", [NAMES[n % 3 > 0] for n in range(len(rows))])


def run_of(lab, vllm, folder, **settings):
    teachers = {"here": str(lab.student), "served": vllm.url}
    return make_trainer(lab, folder, teachers, rows_of(lab), **(SETTINGS | settings))


@torch.no_grad()
def alone(student, teachers, batch):
    """Signals of all positions in the batch's order, every row's from its own teacher by itself."""
    parts, places_of = [], []
    for number, teacher in enumerate(teachers):
        own = batch["teacher_index"] == number
        rows = {k: v for k, v in batch.items() if torch.is_tensor(v) and v.ndim}
        part = {name: value[own] for name, value in rows.items()}
        positions = Positions.of(part["completion_mask"].bool())
        scored = score_remote(
            partial(forward, VOCAB),
            student,
            teacher,
            part,
            positions,
            micro_batch_size=4,
            vocab_size=VOCAB,
            k=K,
            when="",
        )
        parts.append(scored.signals)
        width = part["completion_mask"].shape[1]
        places_of.append(own.nonzero()[:, 0][positions.row] * width + positions.column)
    joined, order = concatenate(parts), torch.cat(places_of).argsort()
    columns = ("disagreement", "compatibility", "student_logprobs", "teacher_logprobs")
    return [getattr(joined, name)[order] for name in columns]


@pytest.mark.parametrize("scope", ["global", "teacher"])
def test_kept_tokens_and_loss_are_those_of_each_teacher_by_itself(
    vllm, lab, models, tmp_path, scope
):
    trainer = run_of(lab, vllm, tmp_path, budget_scope=scope)
    teachers = [Listing(models[0], VOCAB), connect(vllm.url, vocab_size=VOCAB, top_k=K)]
    losses, others, num_kept = [], 0, dict.fromkeys(NAMES, 0)

    def compare(seen):
        nonlocal others
        assert seen.teachers == NAMES and "teacher_prompt_ids" in seen.batch
        d, c, mine, theirs = alone(trainer.model, teachers, seen.batch)
        torch.testing.assert_close(seen.signals.disagreement, d, rtol=0.0, atol=1e-5)
        torch.testing.assert_close(seen.signals.compatibility, c, rtol=0.0, atol=1e-5)
        of = seen.batch["teacher_index"][seen.positions.row]
        score, expected = normalized(d) * normalized(c), torch.zeros_like(d, dtype=torch.bool)
        for group in [of == 0, of == 1] if scope == "teacher" else [of >= 0]:
            own = group.nonzero()[:, 0]
            best = score[own].topk(counted(0.1, len(own))).indices
            expected[own[best]] = True
        kept = seen.choice.selection.kept
        differs = kept != expected
        assert ((score[differs] - score[expected].min()).abs() <= TIE).all(), "more than ties"
        others += int(differs.sum())
        losses.append(float((mine - theirs)[kept].double().mean()))
        for number, name in enumerate(NAMES):
            num_kept[name] += int((kept & (of == number)).sum())

    trainer.observers.append(compare)
    trainer.train(check=False)
    logged = [log["loss/selected_nats"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-5, abs=1e-5) and len(losses) == 4
    apart = max(abs(a - b) for a, b in zip(logged, losses, strict=True))
    print(json.dumps({"kept": num_kept, "kept by one alone": others, "losses apart": apart}))
    assert min(num_kept.values()) > 0, "vacuous"
    about = json.loads((tmp_path / "run/teacher.json").read_text())
    assert about["compatibility"] == "lower bound"
    teachers[1].close()


def test_two_ranks_are_as_one(vllm, lab, tmp_path):
    """With accumulation; every rank asks the server for its own rows."""
    settings = ANCHORED | SPREAD | SEES_MORE | {"accumulation": 2, "max_steps": 2}
    settings |= {"loss": "sampled_reverse_kl", "budget_scope": "teacher", "learning_rate": 0.1}
    case = {"name": "served", "settings": settings, "teachers": ["math", "code", "code"]}
    case |= {"served": vllm.url, "worlds": [1, 2]}
    run_script(WORKER, str(lab.folder), str(tmp_path), json.dumps([case]), timeout=300)
    one, truth = by_rank(tmp_path, "served", "ddp", 1)
    for way in ("ddp", "fsdp2"):
        ranks, gradients = by_rank(tmp_path, "served", way, 2)
        for key in ("kept", "anchored"):
            assert places(ranks, key) == places(one, key) != [set(), set()], key
        for mine, theirs in zip(ranks[0]["log"], one[0]["log"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name, gradient in truth.items():
            difference = float((gradients[name] - gradient).norm())
            assert difference <= 1e-5 * max(map(torch.linalg.norm, truth.values())), name


@pytest.mark.parametrize("step", [1, 2])  # within a generation batch, and between two
def test_a_resumed_run_ends_the_same_to_the_bit(vllm, lab, tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = run_of(lab, vllm, tmp_path, **settings)
    trained(whole)
    expected = weights_of(whole)
    part = run_of(lab, vllm, tmp_path, **settings)
    trained(part, resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(part).items())
