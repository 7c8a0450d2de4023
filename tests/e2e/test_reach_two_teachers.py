"""Reach with several teachers: each token's mass is that of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd.teachers import LocalTeacher
from tests.e2e.test_reach_training import reach_of
from tests.e2e.test_two_teachers import logprobs_at, make_trainer, models, paths, trained

__all__ = ["models", "paths"]
REACH = {"method": "reach", "reach_threshold": 0.025, "anchor_coef": 3.0, "max_steps": 2}


def reach_by_hand(scored, initial, models, threshold=0.025):
    """r of every completion token from the bare sequences, and which teacher it has."""
    found, names = [], []
    for row in range(len(scored.batch["prompt_ids"])):
        name = scored.teachers[int(scored.batch["teacher_index"][row])]
        with torch.no_grad():
            start, _ = logprobs_at(initial, scored, row)
            theirs, _ = logprobs_at(models[name], scored, row, "teacher")
        found.append(reach_of(start.double(), theirs.double(), threshold))
        names += [name] * len(theirs)
    return torch.cat(found), names


@pytest.fixture(scope="module")
def initial(micro_lab):
    return AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32).eval()


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_every_token_is_judged_by_its_own_teacher(
    micro_lab, tmp_path, paths, models, initial, loss
):
    for scored in trained(make_trainer(micro_lab, tmp_path, paths, loss=loss, **REACH)):
        r, names = reach_by_hand(scored, initial, models)
        torch.testing.assert_close(scored.signals.reach.double(), r, atol=1e-4, rtol=0)
        assert len(set(names)) == 2 and 0.02 < r.mean() < 0.98, "vacuous"


def test_what_is_remembered_meets_the_mass_of_each_tokens_own_teacher(
    micro_lab, tmp_path, paths, models, initial
):
    """In the second batch the initial student runs on half of the completions, of both teachers."""
    half = {"anchor_responses": 0.5, "anchor_fraction": 0.5}  # all tokens of the drawn completions
    trainer = make_trainer(micro_lab, tmp_path, paths, **half, **REACH)
    for scored in trained(trainer):
        r, names = reach_by_hand(scored, initial, models)
        row = scored.positions.row
        here = torch.isin(row, row[scored.choice.reference_mask])
        torch.testing.assert_close(scored.signals.reach.double()[here], r[here], atol=1e-4, rtol=0)
    mass = []
    for row in range(len(scored.batch["prompt_ids"])):
        name = scored.teachers[int(scored.batch["teacher_index"][row])]
        with torch.no_grad():
            mass.append(logprobs_at(models[name], scored, row, "teacher")[0].double().exp())
    # The memory of the last batch is the one that it was read with.
    remembered = torch.cat(mass) @ trainer._anchor.memory._memory.shares()
    assert len({name for name, inside in zip(names, here.tolist(), strict=True) if not inside}) == 2
    torch.testing.assert_close(
        scored.signals.reach.double()[~here], remembered[~here], atol=1e-4, rtol=0
    )


def test_where_one_teacher_is_elsewhere_all_reach_is_a_bound(
    micro_lab, tmp_path, paths, models, initial
):
    """A selection would otherwise compare sums over the vocabulary with sums over a list."""
    both = {"code": LocalTeacher(models["code"], 40), "math": paths["math"]}
    for scored in trained(
        make_trainer(micro_lab, tmp_path, both, loss="sampled_reverse_kl", **REACH)
    ):
        truth, names = reach_by_hand(scored, initial, models)
        bound = scored.signals.reach.double()
        assert bool((bound <= truth + 1e-5).all())
        for name in set(names):
            own = torch.tensor([name == each for each in names])
            assert bool((bound[own] < truth[own] - 1e-3).any()), name
