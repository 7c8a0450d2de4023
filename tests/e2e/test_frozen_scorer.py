"""`selector: teachability_frozen`. Oracles: both definitions in float64, from the models' own forwards."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd.errors import ConfigError
from taopd.teachers import LocalTeacher
from tests.e2e.test_reach_training import LORA, SGD, at, full_logprobs, models_of, watched
from tests.e2e.test_reach_two_teachers import logprobs_at
from tests.e2e.test_teacher_training import make_trainer as remote_trainer
from tests.e2e.test_trainer import make_trainer
from tests.e2e.test_two_teachers import make_trainer as routed_trainer
from tests.e2e.test_two_teachers import models, paths

__all__ = ["models", "paths"]
K, TEMPERATURE = 4, 0.05
SETTINGS = {"selector": "teachability_frozen", "score_top_k": K, "budget": 0.2}
FAST = SGD | {"temperature": TEMPERATURE}


def d_and_c(student, teacher):
    """D and C of rows of float64 log-probs. [docs/math.md]"""
    found = []
    for p, q in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True):
        ours, theirs = (sorted(range(len(p)), key=lambda v: -x[v])[:K] for x in (p, q))
        union = {*ours, *theirs}
        total_p, total_q = sum(p[v] for v in union), sum(q[v] for v in union)
        d = sum(q[v] / total_q * math.log(q[v] / total_q * total_p / p[v]) for v in union)
        found.append((d, sum(q[v] for v in ours)))
    d, c = zip(*found, strict=True)
    return torch.tensor(d).double(), torch.tensor(c).double()


def scaled(values):
    low, high = values.quantile(0.05), values.quantile(0.95)
    return ((values - low) / (high - low + 1e-12)).clamp(0.0, 1.0)


def check(scored, d, c):
    """The signals, and that the kept are the best by them."""
    signals = scored.signals
    torch.testing.assert_close(signals.initial_disagreement.double(), d, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(signals.initial_compatibility.double(), c, atol=2e-4, rtol=1e-3)
    score, kept = scaled(d) * scaled(c), scored.choice.selection.kept
    assert int(kept.sum()) == math.ceil(0.2 * len(d))
    assert float(score[kept].min()) >= float(score[~kept].max()) - 1e-3


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
@pytest.mark.parametrize("peft_config", [None, LORA])
def test_the_student_as_it_was_decides(micro_lab, tmp_path, loss, peft_config):
    trainer = make_trainer(
        micro_lab, tmp_path, **SETTINGS, **FAST, loss=loss, peft_config=peft_config
    )
    seen = watched(trainer)
    initial, teacher, _ = models_of(micro_lab, {})
    for scored, _ in seen:
        check(
            scored,
            *d_and_c(*(at(scored, full_logprobs(m, scored.batch)) for m in (initial, teacher))),
        )
    first, last = seen[0][0].signals, seen[2][0].signals
    # At first it is the student; where that has moved, its own D is another.
    assert torch.equal(first.initial_disagreement, first.disagreement)
    assert float((last.initial_disagreement - last.disagreement).abs().max()) > 1e-3, "vacuous"


def test_every_token_is_scored_with_its_own_teacher(micro_lab, tmp_path, paths, models):
    trainer = routed_trainer(micro_lab, tmp_path, paths, **SETTINGS, max_steps=1)
    initial = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32).eval()
    scored, _ = watched(trainer)[0]
    rows = []
    for row in range(len(scored.batch["prompt_ids"])):
        name = scored.teachers[int(scored.batch["teacher_index"][row])]
        with torch.no_grad():
            start, _ = logprobs_at(initial, scored, row)
            theirs, _ = logprobs_at(models[name], scored, row, "teacher")
        rows.append((start.double(), theirs.double()))
    d, c = d_and_c(*(torch.cat(each) for each in zip(*rows, strict=True)))
    torch.testing.assert_close(
        scored.signals.initial_disagreement.double(), d, atol=2e-4, rtol=1e-3
    )
    torch.testing.assert_close(
        scored.signals.initial_compatibility.double(), c, atol=2e-4, rtol=1e-3
    )


def test_a_teacher_that_cannot_be_asked_for_the_start_is_refused(micro_lab, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()
    with pytest.raises(ConfigError, match=r"no initial_compatibility.*load the teacher in this"):
        remote_trainer(micro_lab, tmp_path, LocalTeacher(model, 40), **SETTINGS)
    with pytest.raises(ConfigError, match="signals='exact'"):
        make_trainer(SimpleNamespace(**vars(micro_lab)), tmp_path, **SETTINGS, signals="topk_lists")
