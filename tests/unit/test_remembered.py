"""What is remembered of the initial student. Oracles: the means as they are written, in float64."""

import math

import pytest
import torch

from taopd.kernels import Head
from taopd.losses import anchor_weights, drawn_completions
from taopd.signals import (
    StartMemory,
    reach_from_logprobs,
    reach_from_shares,
    remembered_reach,
    sums_from_logprobs,
    sums_from_states,
)
from taopd.signals import reach as reach_module
from taopd.signals.reach import counts
from tests.unit.simulated_ranks import World

THRESHOLD = 1e-2
HALVES_IN = 34


def rows_of(num, vocab_size=7, seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(num, vocab_size, generator=generator)).log_softmax(-1)


def batch(num, seed):
    """Initial student, teacher, sampled tokens, the start's log-probs of these."""
    initial, teacher = rows_of(num, seed=2 * seed), rows_of(num, seed=2 * seed + 1)
    tokens = torch.randint(0, 6, (num,), generator=torch.Generator().manual_seed(seed))
    return initial, teacher, tokens, initial.gather(1, tokens[:, None]).squeeze(1)


def sums_of(initial, teacher, tokens, sampled, ends=()):
    return sums_from_logprobs(
        counts(initial, THRESHOLD, (), ends), teacher, tokens, sampled.clone()
    )


def test_the_means_are_their_definition():
    batches = [batch(num, seed) for seed, num in enumerate((5, 9, 4))]
    memory = StartMemory()
    for each in batches:
        memory.add(sums_of(*each, ends=(3,)))
    top, bottom = [0.0] * 7, [0.0] * 7
    said, times = [0.0] * 7, [0.0] * 7
    for age, (initial, teacher, tokens, sampled) in zip((2, 1, 0), batches, strict=True):
        for row in range(len(tokens)):
            for v in range(7):
                p, q = (math.exp(float(each[row, v])) for each in (initial, teacher))
                top[v] += 0.98**age * q * (0.0 if v == 3 else p / (p + THRESHOLD))
                bottom[v] += 0.98**age * q
            said[int(tokens[row])] += 0.98**age * float(sampled[row])
            times[int(tokens[row])] += 0.98**age
    shares = memory.shares()
    assert shares.tolist() == pytest.approx(
        [a / b for a, b in zip(top, bottom, strict=True)], rel=1e-5
    )
    assert shares[3] == 0.0
    seen = torch.tensor([v for v in range(7) if times[v]])
    found = memory.logprobs(seen, torch.zeros(len(seen)))
    assert found.tolist() == pytest.approx([said[v] / times[v] for v in seen.tolist()], rel=1e-5)
    assert abs(0.98**HALVES_IN - 0.5) < 0.01


def test_a_token_that_was_not_seen_has_what_is_given_instead():
    """6 is never sampled, and the teacher never gave 5 any mass: nothing of it is within reach."""
    initial, teacher, tokens, sampled = batch(8, seed=1)
    teacher = teacher.clone()
    teacher[:, 5] = -torch.inf
    memory = StartMemory()
    assert memory.empty
    memory.add(sums_of(initial, teacher.log_softmax(-1), tokens, sampled))
    assert not memory.empty and memory.shares()[5] == 0.0
    assert memory.logprobs(torch.tensor([6]), torch.tensor([-1.25])).item() == -1.25


def test_a_batch_without_a_position_leaves_a_memory_empty_and_means_as_they_are():
    memory, nothing = StartMemory(), sums_of(*batch(0, seed=0))
    memory.add(nothing)
    assert memory.empty
    memory.add(sums_of(*batch(6, seed=3)))
    before = memory.shares()
    memory.add(nothing)
    torch.testing.assert_close(memory.shares(), before)


@pytest.mark.parametrize("ends", [(), (2,)])
def test_a_start_that_says_the_same_everywhere_is_remembered_exactly(ends):
    """Then nothing is lost: r is that of the start itself."""
    initial = rows_of(1, seed=5).expand(9, -1)
    _, teacher, tokens, sampled = batch(9, seed=6)
    memory = StartMemory()
    memory.add(sums_of(initial, teacher, tokens, sampled, ends))
    others = rows_of(4, seed=8)
    found = reach_from_shares(others, memory.shares())
    exact = reach_from_logprobs(initial[:4], others, threshold=THRESHOLD, foreign_ends=ends)
    assert exact.min() < 0.1 < 0.5 < exact.max() < 0.95, "vacuous"
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num", [0, 1, 5])
@pytest.mark.parametrize(("temperature", "stops", "ends"), [(1.0, (), ()), (0.7, (1, 4), (3,))])
def test_from_states_it_is_that_of_the_log_probs(monkeypatch, num, temperature, stops, ends):
    """Two positions are in memory at a time."""
    monkeypatch.setattr(reach_module, "chunk_elements_on", lambda _: 14)
    torch.manual_seed(0)
    heads = [Head(weight=torch.randn(7, width)) for width in (3, 5)]
    states = [torch.randn(num, width) for width in (3, 5)]
    tokens = torch.arange(num) % 7
    logprobs = [
        (s @ h.weight.T / temperature).log_softmax(-1) for s, h in zip(states, heads, strict=True)
    ]
    sampled = torch.randn(num)
    at_one = (states[0] @ heads[0].weight.T).log_softmax(-1)
    expected = sums_from_logprobs(
        counts(at_one, THRESHOLD, stops, ends), logprobs[1], tokens, sampled
    )
    found = sums_from_states(
        (states[0], heads[0]),
        (states[1], heads[1]),
        tokens,
        sampled,
        threshold=THRESHOLD,
        temperature=temperature,
        stop_ids=stops,
        foreign_ends=ends,
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    shares = torch.rand(7, dtype=torch.float64)
    reach = remembered_reach(states[1], heads[1], shares, temperature=temperature)
    torch.testing.assert_close(reach, (logprobs[1].exp() @ shares.float()), atol=1e-6, rtol=0)


COMPLETIONS = torch.tensor([0] * 4 + [1] * 2 + [2] * 5 + [3] + [4] * 3 + [6] * 2)


@pytest.mark.parametrize("responses", [0.25, 0.5, 1.0])
def test_the_completions_are_those_in_which_tokens_are_held(responses):
    kept = torch.zeros_like(COMPLETIONS, dtype=torch.bool)
    seen = set()
    for step in range(20):
        inside = drawn_completions(COMPLETIONS, responses=responses, seed=3, step=step)
        assert len(COMPLETIONS[inside].unique()) == math.ceil(responses * 6)
        assert torch.equal(inside, torch.isin(COMPLETIONS, COMPLETIONS[inside]))
        weights = anchor_weights(
            kept, ~kept, COMPLETIONS, fraction=0.2, responses=responses, seed=3, step=step
        )
        assert not weights[~inside].any()
        seen |= set(COMPLETIONS[weights != 0].tolist())
    assert seen == set(COMPLETIONS.tolist())


def test_ranks_draw_the_completions_of_one_process():
    whole = drawn_completions(COMPLETIONS, responses=0.5, seed=1, step=7)
    parts = [COMPLETIONS[:6], COMPLETIONS[6:12], COMPLETIONS[12:]]

    def draw(ranks, own):
        # A rank numbers its completions from 0.
        return drawn_completions(own - own[0], responses=0.5, seed=1, step=7, ranks=ranks)

    assert torch.equal(torch.cat(World(3).run(draw, parts)), whole)
