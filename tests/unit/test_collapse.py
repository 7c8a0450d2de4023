"""What holds a run up, and what warns: two-stage anchors, idle drift, the watch."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from taopd.losses import anchor_weights
from taopd.signals import at_ids, idle_drift
from taopd.trainer.selection import guard_is_due
from taopd.trainer.watches.collapse_detector import DRIFT_LIMIT, OF_FIRST, CollapseWatch


def test_anchors_of_drawn_completions_are_unbiased_and_leave_the_other_completions_alone():
    completion = torch.arange(200).repeat_interleave(50)
    kept = torch.arange(10_000) % 20 == 0
    valid = torch.ones(10_000, dtype=torch.bool)
    sums = []
    for step in range(200):
        weights = anchor_weights(
            kept, valid, completion, fraction=0.05, responses=0.25, seed=1, step=step
        )
        assert completion[weights != 0].unique().numel() <= 50
        assert (weights[kept] == 0).all()
        sums.append(float(weights.sum()))
    mean = sum(sums) / len(sums)
    sigma = math.sqrt(sum((each - mean) ** 2 for each in sums) / len(sums) / len(sums))
    assert abs(mean - 0.95) < 4 * sigma


def test_idle_drift_counts_moves_that_lead_nowhere_and_not_those_to_the_teacher():
    start = torch.tensor([[0.98, 0.01, 0.01]]).log()
    teacher = torch.tensor([[0.01, 0.98, 0.01]]).log()
    there = torch.tensor([[0.10, 0.89, 0.01]]).log()
    nowhere = torch.tensor([[0.10, 0.01, 0.89]]).log()
    assert idle_drift(there, start, teacher, there, start).item() == 0.0
    kl = float((nowhere.exp() * (nowhere - start)).sum())
    assert idle_drift(nowhere, start, teacher, nowhere, start).item() == pytest.approx(kl, abs=1e-5)
    assert idle_drift(start, start, teacher, start, start).item() == pytest.approx(0.0, abs=1e-6)


def test_a_list_is_read_at_other_ids():
    ids, logprobs = torch.tensor([[4, 2, -1]]), torch.tensor([[-0.5, -1.0, -torch.inf]])
    assert at_ids(ids, logprobs, torch.tensor([[2, 3, -1]])).tolist() == [
        [-1.0, -math.inf, -math.inf]
    ]


def test_the_watch_warns_once_with_the_reason_and_goes_on_after_a_restart():
    watch = CollapseWatch()
    for step in range(0, 50, 5):
        assert watch.update(step, {"idle_drift": 0.02, "length": 9.0, "entropy": 0.4}) == []
    assert watch.healthy_step == 45
    other = CollapseWatch()
    other.load(watch.state())
    for each in (watch, other):
        reasons = [each.update(step, {"idle_drift": 4 * DRIFT_LIMIT}) for step in (50, 55, 60)]
        (text,) = [text for found in reasons for text in found]
        assert "moved away from the initial student" in text and "anchor_coef" in text
        assert each.fired == {"idle_drift": 50} and each.healthy_step == 45


@pytest.mark.parametrize(
    ("name", "start", "then"),
    [("entropy", 0.4, 2.0), ("length", 100.0, 20.0)],
)
def test_the_coarse_watches(name, start, then):
    watch = CollapseWatch()
    for step in range(8):
        assert watch.update(step, {name: start}) == []
    found = [text for step in range(8, 20) for text in watch.update(step, {name: then})]
    assert len(found) == 1 and list(watch.fired) == [name]


@pytest.mark.parametrize(
    ("entropies", "warned"),
    [
        ((0.4, 0.4, 0.4), False),
        ((0.4, 0.3, 0.1, 0.15), False),  # surer than at first, and about as sure as ever
        ((0.4, 0.4 * OF_FIRST**0.5), False),  # the noise of a batch
        ((0.4, 0.3, 0.9), True),  # less sure than at first
        ((0.4, 0.04, 0.04, 0.04, 0.3), True),  # far less sure than it had become
    ],
)
def test_drift_is_a_sign_in_a_student_that_is_less_sure_than_it_was(entropies, warned):
    watch, resumed = CollapseWatch(), CollapseWatch()
    for step, entropy in enumerate(entropies[:-1]):
        assert watch.update(step, {"entropy": entropy, "idle_drift": 0.0}) == []
    resumed.load(json.loads(json.dumps(watch.state())))
    for each in (watch, resumed):
        last = {"entropy": entropies[-1], "idle_drift": 5 * DRIFT_LIMIT}
        found = each.update(len(entropies), last)
        assert bool(found) == warned and (not found or "less sure" in found[0])
    # Without drift none of this is a reason.
    calm = CollapseWatch()
    assert not any(
        calm.update(n, {"entropy": e, "idle_drift": 0.0}) for n, e in enumerate(entropies)
    )


@pytest.mark.parametrize(("every", "uses"), [(5, 1), (5, 2), (5, 4), (5, 7), (2, 3), (6, 4)])
def test_the_guard_looks_as_often_as_asked_where_a_batch_trains_several_steps(every, uses):
    asked = {"guard_every": every, "collapse_guard": "warn", "num_iterations": uses}
    looked = [step for step in range(0, 60, uses) if guard_is_due(step, SimpleNamespace(**asked))]
    wanted = range(0, looked[-1] + uses, every)
    assert looked == sorted({step - step % uses for step in wanted})
