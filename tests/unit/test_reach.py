"""`method: reach`: r and the rule around it. Oracles: the definitions in plain Python floats."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_tables import random_table
from trl import DistillationConfig

from taopd.errors import ConfigError
from taopd.kernels import Head
from taopd.losses import Targets, by_reach, resolve_loss
from taopd.models.stop_tokens import foreign_ends
from taopd.signals import (
    foreign_bound,
    foreign_mass,
    lists_from_exact,
    reach_bound,
    reach_from_logprobs,
    reach_from_states,
    signal_table,
    signals_from_logprobs,
)
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import loss_of_run
from taopd.trainer.metrics import selection_metrics
from taopd.trainer.selection import choose, gather_options, reads_initial
from tests.unit.simulated_ranks import World, split

VOCAB = 11


def logprobs(num, seed, sharpness=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num, VOCAB, generator=generator, dtype=dtype)
    return logits.log_softmax(-1)


def reach_by_definition(initial, teacher, threshold, stop_ids=(), foreign_ends=()):
    """r of one position from two lists of probabilities."""
    total = 0.0
    for v, mass in enumerate(teacher):
        if v in foreign_ends:
            continue
        said = sum(initial[s] for s in stop_ids) if v in stop_ids else initial[v]
        total += mass * said / (said + threshold)
    return total


def config(**values):
    return TeachabilityConfig(output_dir="runs/x", bf16=False, use_cpu=True, **values)


# r


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("stop_ids", [(), (2, 7)])
def test_reach_is_its_definition(threshold, stop_ids):
    initial, teacher = logprobs(30, 0), logprobs(30, 1)
    found = reach_from_logprobs(initial, teacher, threshold=threshold, stop_ids=stop_ids)
    rows = zip(initial.exp().tolist(), teacher.exp().tolist(), strict=True)
    expected = [reach_by_definition(p, q, threshold, stop_ids) for p, q in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert threshold == 0.0 or max(expected) - min(expected) > 0.3, "vacuous"


def test_the_threshold_counts_half_and_what_is_impossible_not_at_all():
    initial = torch.tensor([[0.0, 1e-6, 1e-4, 1e-2, 1.0]]).double().log()
    found = [
        float(reach_from_logprobs(initial, torch.eye(5).double()[[v]].log())) for v in range(5)
    ]
    assert found == pytest.approx([0.0, 1 / 101, 1 / 2, 100 / 101, 1 / (1 + 1e-4)], abs=1e-6)


def test_a_stop_class_is_within_reach_as_a_whole():
    """Two end tokens that the initial student gives half the threshold each: together they count half."""
    initial = torch.tensor([[1.0 - 2e-3, 1e-3, 1e-3]]).double().log()
    teacher = torch.tensor([[0.0, 1.0, 0.0]]).double().log()
    apart = reach_from_logprobs(initial, teacher, threshold=2e-3)
    together = reach_from_logprobs(initial, teacher, threshold=2e-3, stop_ids=(1, 2))
    assert (float(apart), float(together)) == pytest.approx((1 / 3, 0.5))


@pytest.mark.parametrize("threshold", [0.0, 0.03])
def test_an_end_at_which_the_sampler_goes_on_is_out_of_reach(threshold):
    """However likely it is; the teacher may have ids that the student lacks."""
    initial, teacher = logprobs(30, 0), logprobs(30, 1)
    ends = {"foreign_ends": (4, 6, VOCAB + 3)}
    found = reach_from_logprobs(initial, teacher, threshold=threshold, **ends)
    rows = zip(initial.exp().tolist(), teacher.exp().tolist(), strict=True)
    expected = [reach_by_definition(p, q, threshold, foreign_ends=(4, 6)) for p, q in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    without = reach_from_logprobs(initial, teacher, threshold=threshold)
    assert float((without - found).max()) > 0.3, "vacuous"
    # K of the whole vocabulary: the bound is r.
    student = logprobs(30, 2)
    signals = signals_from_logprobs(student, teacher, torch.zeros(30).long(), k=VOCAB)
    lists = (signals.student_topk_ids, signals.teacher_topk_ids)
    bound = reach_bound(
        signals, *(initial.gather(1, ids) for ids in lists), threshold=threshold, **ends
    )
    torch.testing.assert_close(bound, found)


def test_the_ends_of_a_teacher_alone():
    """Declared by the teacher or given, less those at which the sampler stops; a merged end is one's own."""

    def model(ends):
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))

    teachers = (model([5, 2]), model(7), model(None), None)
    assert foreign_ends("train", None, [2, 3], *teachers) == (5, 7)
    assert foreign_ends("exclude", [9, 3], [2, 3], *teachers) == (5, 7, 9)
    assert foreign_ends("merge", None, [2, 3], *teachers) == ()
    assert foreign_ends("merge", [2, 7], [2, 3], *teachers) == (5,), "merged are those given alone"
    assert foreign_ends("train", None, [2, 3]) == ()


@given(st.integers(0, 1000), st.floats(0.1, 40.0), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_reach_is_a_share_that_falls_with_the_threshold(seed, sharpness, threshold):
    initial = logprobs(5, seed, sharpness, torch.float32)
    teacher = logprobs(5, seed + 1, sharpness, torch.float32)
    r = reach_from_logprobs(initial, teacher, threshold=threshold)
    assert bool(((r >= 0) & (r <= 1)).all())
    assert bool((r <= reach_from_logprobs(initial, teacher, threshold=threshold / 2) + 1e-6).all())
    assert torch.equal(reach_from_logprobs(initial, teacher, threshold=0.0), torch.ones(5))


@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_reach_from_states_is_that_of_the_log_probs(num_rows, monkeypatch):
    monkeypatch.setattr("taopd.signals.reach.chunk_elements_on", lambda device: 7 * VOCAB)
    generator = torch.Generator().manual_seed(3)

    def model(width):
        hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
        weight = torch.randn(VOCAB, width, generator=generator, dtype=torch.float64)
        return hidden, Head(weight=weight, softcap=5.0)

    models, options = (model(4), model(6)), {"threshold": 0.02, "stop_ids": (1, 3)}
    tokens = torch.arange(num_rows) % VOCAB
    found, sampled = reach_from_states(*models, tokens, temperature=0.7, **options)
    raw = [5.0 * torch.tanh(hidden @ head.weight.T / 5.0) for hidden, head in models]
    # Of the start at temperature 1, of what is sampled and taught at that of sampling.
    full = raw[0].log_softmax(-1), (raw[1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(found, reach_from_logprobs(*full, **options))
    stops, p = {1, 3}, (raw[0] / 0.7).softmax(-1).tolist()
    expected = [
        sum(p[row][v] for v in (stops if y in stops else {y}))
        for row, y in enumerate(tokens.tolist())
    ]
    torch.testing.assert_close(sampled.exp(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scored", [True, False])
def test_a_bound_never_exceeds_reach_and_says_how_far_it_may_be_off(scored):
    """From a server: below the true r, by at most the mass that the answer leaves open."""
    student, teacher, initial = logprobs(60, 0), logprobs(60, 1), logprobs(60, 2)
    signals = signals_from_logprobs(student, teacher, torch.zeros(60).long(), k=3)
    if not scored:
        signals = replace(signals, teacher_at_student_ids=None)
    lists = (signals.student_topk_ids, signals.teacher_topk_ids)
    at = [initial.gather(1, ids) for ids in lists]
    bound = reach_bound(signals, *at, threshold=0.03)
    truth = reach_from_logprobs(initial, teacher, threshold=0.03)
    asked = lists if scored else lists[1:]
    open_mass = []
    for row in range(60):
        known = {int(v) for ids in asked for v in ids[row]}
        open_mass.append(1.0 - sum(math.exp(float(teacher[row, v])) for v in known))
    assert bool((bound <= truth + 1e-9).all())
    assert bool((truth <= bound + torch.tensor(open_mass) + 1e-9).all())
    assert float((truth - bound).max()) > 0.01, "vacuous"
    # A list that is shorter than K has no id to ask about.
    short = replace(signals, teacher_topk_ids=torch.full_like(lists[1], -1))
    if not scored:
        assert not bool(reach_bound(short, *at, threshold=0.0).any())


def test_the_foreign_mass_is_its_definition():
    """Of states, and as a bound of a server's list; an id that the teacher lacks has none."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, 4, generator=generator)
    head = Head(weight=torch.randn(VOCAB, 4, generator=generator))
    ends = (4, 6, VOCAB + 3)
    teacher = (hidden.double() @ head.weight.double().T / 0.7).log_softmax(-1)
    truth = teacher[:, [4, 6]].exp().sum(1)
    found = foreign_mass(hidden, head, ends, temperature=0.7)
    torch.testing.assert_close(found.double(), truth, atol=1e-6, rtol=0)
    assert not bool(foreign_mass(hidden, head, (VOCAB,)).any())
    assert foreign_mass(hidden[:0], head, ends).shape == (0,)
    signals = signals_from_logprobs(logprobs(20, 2), teacher, torch.zeros(20).long(), k=3)
    listed = [
        sum(math.exp(float(row[v])) for v in ids.tolist() if v in ends)
        for row, ids in zip(teacher, signals.teacher_topk_ids, strict=True)
    ]
    assert foreign_bound(signals, ends).tolist() == pytest.approx(listed, abs=1e-12)
    assert max(listed) > 0.0 and min(listed) == 0.0, "vacuous"


@pytest.mark.parametrize("ends", [(), (2,), (0, 3, VOCAB + 1)])
@pytest.mark.parametrize(
    ("name", "elsewhere"),
    [
        ("reverse_kl", False),
        ("jsd", False),
        ("sampled_reverse_kl", False),
        ("sampled_reverse_kl", True),
        ("fixed_advantage", False),
    ],
)
def test_the_loss_by_reach_is_its_definition(name, elsewhere, ends):
    """Row by row in float64; every third token is held. Of the ends, one is not in the vocabulary."""
    student, teacher = logprobs(12, 0), logprobs(12, 1)
    hidden = torch.eye(VOCAB, dtype=torch.float64)
    tokens, held = torch.arange(12) % VOCAB, torch.arange(12) % 3 == 0
    r = torch.linspace(0, 1, 12, dtype=torch.float64).masked_fill(held, 1.0)
    targets = Targets(
        token_ids=tokens,
        # log-probs as states of a head that is the identity
        teacher_hidden=None if elsewhere else teacher,
        teacher_head=Head(weight=hidden),
        teacher_logprobs=teacher.gather(1, tokens[:, None]).squeeze(1),
        reach=r,
        held=held,
    )
    of_sampled = name in ("sampled_reverse_kl", "fixed_advantage")
    exact = resolve_loss("reverse_kl") if of_sampled else None
    found = by_reach(resolve_loss(name), exact, foreign_ends=ends)(student, targets)
    for i in range(12):
        p, q = student[i].exp(), teacher[i].exp()
        reverse = float((p * (student[i] - teacher[i])).sum())
        taught = [v for v in range(VOCAB) if v not in ends]
        foreign = sum(float(q[v]) for v in ends if v < VOCAB)
        forward = sum(
            float(q[v] / (1 - foreign) * (q[v].log() - math.log(1 - foreign) - student[i, v]))
            for v in taught
        )
        middle = ((p + q) / 2).log()
        jsd = float((p * (student[i] - middle) + q * (teacher[i] - middle)).sum()) / 2
        sampled = float(student[i, tokens[i]] - teacher[i, tokens[i]])
        values = {"reverse_kl": reverse, "jsd": jsd, "sampled_reverse_kl": sampled}
        own = (values | {"fixed_advantage": 1.0})[name]
        if held[i] and of_sampled and not elsewhere:
            own = reverse
        rest = 0.0 if elsewhere else forward
        beyond = max(0.0, 1 - float(r[i]) - foreign)
        assert float(found[i]) == pytest.approx(float(r[i]) * own + beyond * rest)


def test_a_foreign_end_is_not_raised_where_something_else_is_selected():
    """The gradient of the part beyond reach lowers it, whatever the teacher gives it."""
    student = torch.zeros(1, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.3] + [0.2 / (VOCAB - 2)] * (VOCAB - 2)]).double().log()
    for ends, sign in (((), -1.0), ((0,), 1.0)):
        targets = Targets(
            token_ids=torch.tensor([1]),
            teacher_hidden=teacher,
            teacher_head=Head(weight=torch.eye(VOCAB, dtype=torch.float64)),
            reach=torch.zeros(1, dtype=torch.float64),
        )
        exact = resolve_loss("reverse_kl")
        loss = by_reach(exact, foreign_ends=ends)(student.log_softmax(-1), targets)
        slopes = torch.autograd.grad(loss.sum(), student)[0][0]
        assert float(slopes[0]) * sign > 0.01 and float(slopes[1]) < -0.01


def rows_for(rule, student, teacher, held):
    """The loss of every row, where all are held or all selected at r = 1."""
    tokens = torch.zeros(len(student)).long()
    targets = Targets(
        token_ids=tokens,
        teacher_hidden=teacher,
        teacher_head=Head(weight=torch.eye(VOCAB, dtype=torch.float64)),
        teacher_logprobs=teacher.gather(1, tokens[:, None]).squeeze(1),
        reach=torch.ones(len(student), dtype=torch.float64),
        held=torch.full((len(student),), held),
    )
    return rule(student, targets)


@pytest.mark.parametrize("own", [[1, 2, VOCAB + 2], [VOCAB + 2]])
@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "sampled_reverse_kl"])
def test_what_is_held_ends_as_the_student_does(loss, own):
    """l with all ends as one token, and p_T(ends) log(p_S(ends) / p_S(own ends)), by sums in float64.

    Some ends of either model lie beyond what both have. Without an own end there it is l given that the
    teacher's does not come.
    """
    student, teacher = logprobs(6, 0), logprobs(6, 1)
    rule = loss_of_run(config(method="reach", loss=loss), (), (4, VOCAB + 1), own, VOCAB)
    found = rows_for(rule, student, teacher, held=True)
    for row in range(6):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        which = 0.0
        groups = [[v] for v in range(VOCAB) if v != 4]
        if len(own) > 1:
            groups = [[v] for v in range(VOCAB) if v not in (1, 2, 4)] + [[1, 2, 4]]
            which = (q[1] + q[2] + q[4]) * math.log((p[1] + p[2] + p[4]) / (p[1] + p[2]))
        p, q = ([sum(each[v] for v in group) for group in groups] for each in (p, q))
        p, q = ([value / sum(each) for value in each] for each in (p, q))
        if loss == "forward_kl":
            p, q = q, p
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(found[row]) == pytest.approx(divergence + which, abs=1e-9)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl"])
def test_a_student_that_is_held_comes_to_end_where_the_teacher_does(loss):
    """Whatever it says at first: the teacher's mass on its own end comes to be on the student's."""
    teacher = logprobs(5, 1)
    logits = logprobs(5, 0).clone().requires_grad_()
    args = config(method="reach", loss=loss)
    rule = loss_of_run(args, (), (4,), [1], VOCAB)
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(2000):
        adam.zero_grad()
        rows_for(rule, logits.log_softmax(1), teacher, held=True).sum().backward()
        adam.step()
    expected = teacher.exp()
    expected[:, 1] += expected[:, 4]
    expected[:, 4] = 0.0
    torch.testing.assert_close(logits.softmax(1).detach(), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("merged", [(), (1, 4)])
def test_a_sampled_token_has_the_baseline_with_the_least_noise(merged):
    """In expectation the gradient is the one without, and no other constant gives less variance.

    Both by summing over every token; a constant shifts the gradient of a token by a multiple of that of its
    log-prob.
    """
    teacher, logits = (0.1 * logprobs(1, seed) for seed in (1, 0))
    teacher[:, 2], logits[:, 2] = -8.0, 5.0
    teacher, logits = teacher.log_softmax(-1), logits.requires_grad_()
    function, exact = (
        resolve_loss(name, merged_ids=merged) for name in ("sampled_reverse_kl", "reverse_kl")
    )

    def gradients(centred):
        rows = []
        for token in range(VOCAB):
            y = torch.tensor([token])
            whole = list(merged) if token in merged else [token]
            targets = Targets(
                token_ids=y,
                teacher_hidden=teacher,
                teacher_head=Head(weight=torch.eye(VOCAB, dtype=torch.float64)),
                teacher_logprobs=teacher[:, whole].logsumexp(1),
                reach=torch.ones(1, dtype=torch.float64) if centred else None,
                held=torch.zeros(1, dtype=torch.bool) if centred else None,
            )
            loss = by_reach(function, exact, merged_ids=merged)(logits.log_softmax(-1), targets)
            rows.append(torch.autograd.grad(loss.sum(), logits)[0][0])
        return torch.stack(rows)

    p = logits.detach().softmax(-1)[0].unsqueeze(1)
    plain, centred = gradients(False), gradients(True)
    mean = (p * plain).sum(0)
    torch.testing.assert_close((p * centred).sum(0), mean)
    slopes = torch.stack(
        [
            torch.autograd.grad(
                logits.log_softmax(-1)[:, list(merged) if v in merged else [v]].logsumexp(1).sum(),
                logits,
            )[0][0]
            for v in range(VOCAB)
        ]
    )

    def noise(shift):
        return float((p * (plain - shift * slopes - mean).square()).sum())

    shifts = torch.linspace(-20.0, 20.0, 4001).tolist()
    least = min(noise(shift) for shift in shifts)
    found = float((p * (centred - mean).square()).sum())
    assert mean.abs().max() > 0.01 and found < 0.9 * noise(0.0)
    assert found == pytest.approx(least, rel=0.02 if merged else 1e-3)


# the rule


def new_by_definition(table):
    """Whether a position comes after a token that both models say ten times as often as the start did."""
    names = "student_logprobs", "initial_logprobs", "teacher_logprobs"
    p, p0, q = (table.extra[name].exp().tolist() for name in names)
    of, taken = table.completion.tolist(), [p0[j] < 0.1 * min(p[j], q[j]) for j in range(len(p))]
    return [any(of[j] == of[i] and taken[j] for j in range(i)) for i in range(len(table))]


def lambda_by_definition(table, schedule):
    """Of a token with r >= 0.01, from the sampled tokens, completion by completion."""
    D, r = table.disagreement.tolist(), table.extra["reach"].tolist()
    new, known = [], []
    for i, is_new in enumerate(new_by_definition(table)):
        if table.valid[i]:
            (new if is_new else known).append(D[i] if r[i] >= 0.5 else 0.0)
    if not new or not known:
        return schedule
    worse = sum(new) / len(new) - sum(known) / len(known)
    share = len(known) / (len(new) + len(known))
    return max(schedule, min(1.0, max(0.0, worse) / 0.2) * min(1.0, max(0.0, 4 * share - 1)))


def rule_by_definition(table, args, drawn, schedule=1.0, elsewhere=False):
    """The kept tokens, and every token's weight towards the teacher and towards the start."""
    f = table.extra.get("foreign", torch.zeros(len(table))).tolist()
    valid = [i for i in range(len(table)) if table.valid[i]]
    D, r = table.disagreement.tolist(), table.extra["reach"].tolist()
    new = new_by_definition(table)
    judged = [1.0 - f[i] if new[i] else r[i] for i in range(len(table))]

    def scaled(column):
        values = torch.tensor([column[i] for i in valid], dtype=torch.float64)
        low, high = (float(values.quantile(q)) for q in (0.05, 0.95))
        return {i: min(1.0, max(0.0, (column[i] - low) / (high - low + 1e-12))) for i in valid}

    d = scaled(D)
    n = max(1, math.ceil(args.budget * len(valid)))
    noisy = args.loss == "fixed_advantage" or (args.loss == "sampled_reverse_kl" and elsewhere)
    divisor = len(valid) if noisy else n
    worth = [i for i in valid if D[i] >= 0.05 and judged[i] >= 0.01]
    late = lambda_by_definition(table, schedule)
    lam = [late if r[i] >= 0.01 else schedule for i in range(len(table))]
    g = [lam[i] * max(0.0, 1.0 - (judged[i] + f[i])) for i in range(len(table))]
    kept = set(sorted(worth, key=lambda i: -d[i] * (1.0 - f[i] - g[i]) ** 2)[:n])
    to_teacher, to_start = [0.0] * len(table), [0.0] * len(table)
    for i in valid:
        if i in kept:
            to_teacher[i] = 1.0 / divisor
        elif drawn[i]:
            weight = 1.0 / (args.anchor_fraction * len(valid))
            # Where the teacher's distribution is here, its ends are taught as the student's.
            left = g[i] + f[i] if elsewhere else g[i]
            to_teacher[i], to_start[i] = weight * (1.0 - left), args.anchor_coef * left * weight
    return kept, to_teacher, to_start


def reach_table(seed=0, floor=False):
    """C is r, as `compatibility: reach` has it; `floor`: little is worth teaching.

    One token in 25 the student says ten times as often as the start did; of these every second one is a slip,
    which the teacher says no more often.
    """
    table = random_table(num_rows=400, seed=seed)
    disagreement = table.disagreement
    draws = torch.rand(400, generator=torch.Generator().manual_seed(seed)).double()
    student = 2.0 * (draws - 1.0)
    initial = student - torch.where(draws < 0.04, 2.4, 2.2)
    teacher = student - torch.where((draws > 0.02) & (draws < 0.04), 0.2, 0.0)
    table.extra.update(student_logprobs=student, initial_logprobs=initial, teacher_logprobs=teacher)
    # r + f is at most 1.
    table.extra["foreign"] = table.extra["foreign"] * (1.0 - table.extra["reach"])
    if floor:
        disagreement = disagreement * (0.05 / disagreement.sort(descending=True).values[40])
    return replace(table, disagreement=disagreement, compatibility=table.extra["reach"])


def all_known(table):
    """The same table, no context of which is new to the initial student."""
    known = {"initial_logprobs": table.extra["student_logprobs"]}
    return replace(table, extra=table.extra | known)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("coef", [3.0, 0.0])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl", "fixed_advantage"])
def test_the_rule_is_its_definition(floor, coef, loss, elsewhere):
    table = reach_table(floor=floor)
    args = config(method="reach", budget=0.2, anchor_coef=coef, loss=loss)
    choice = choose(table, args, step=4, training=True, distribution=not elsewhere)
    drawn = choice.reference_mask.tolist()
    kept, to_teacher, to_start = rule_by_definition(table, args, drawn, elsewhere=elsewhere)
    assert set(choice.selection.kept.nonzero().flatten().tolist()) == kept
    assert choice.loss_weights.tolist() == pytest.approx(to_teacher, rel=1e-9)
    assert choice.anchor_weights.tolist() == pytest.approx(to_start, rel=1e-9)
    assert kept and (len(kept) < choice.selection.num_budget) == floor
    r = table.extra["reach"]
    within = (r > 0) | torch.tensor(new_by_definition(table))
    assert torch.equal(choice.held, choice.reference_mask & within) and bool(choice.held.any())
    share = sum(drawn) / (choice.selection.num_valid - len(kept))
    assert 0.04 < share < 0.18, "a tenth of the unselected"
    assert not bool((choice.selection.kept & choice.reference_mask).any())


@pytest.mark.parametrize(
    ("step", "num_steps", "schedule"),
    [
        *((0, 400, 1.0), (120, 400, 0.4), (200, 400, 0.0), (399, 400, 0.0)),
        # A short run lets go no faster than over 100 steps.
        *((50, 51, 0.5), (120, 121, 0.0), (5, 6, 0.95)),
    ],
)
@pytest.mark.parametrize("worse", [0.9, 0.1, -0.2])
@pytest.mark.parametrize("share", ["few", "more", "most", "none", "all"])
def test_the_start_is_let_go_where_new_contexts_are_learned(
    step, num_steps, schedule, worse, share
):
    """Over the first half of the run; what may be selected later, while contexts that are new to the start
    are worse than the others, and as long as there are others.

    `worse`: D of the new ones less that of the others, nats; `share`: of the positions in such a context.
    """
    table, args = reach_table(), config(method="reach", budget=0.05, anchor_fraction=0.8)
    r = table.extra["reach"].clone()
    r[torch.arange(len(table)) % 5 == 0] *= 1e-3
    foreign = 0.5 * (1.0 - r) * (torch.arange(len(table)) % 3 == 0)
    first = {"few": 60, "more": 35, "most": 15, "none": 10**6, "all": -1}[share]
    is_new = table.position == first
    initial = table.extra["student_logprobs"] - torch.where(is_new, 2.4, 2.2)
    after = table.position > first
    disagreement = torch.where(after, 0.3 + worse, 0.3) + 0.01 * table.disagreement
    models = {"initial_logprobs": initial, "teacher_logprobs": table.extra["student_logprobs"]}
    table = replace(
        table,
        disagreement=disagreement,
        extra=table.extra | {"foreign": foreign, "reach": r} | models,
    )
    choice = choose(table, args, step=step, training=True, num_steps=num_steps)
    drawn = choice.reference_mask.tolist()
    _, to_teacher, to_start = rule_by_definition(table, args, drawn, schedule)
    assert choice.loss_weights.tolist() == pytest.approx(to_teacher, rel=1e-9)
    assert choice.anchor_weights.tolist() == pytest.approx(to_start, rel=1e-9, abs=1e-15)
    held = choice.anchor_weights > 0
    assert bool(held[foreign > 0].any()) == bool(held.any()), "what is beyond both"
    assert bool(held[(foreign == 0) & (r < 0.01)].any()) == (schedule > 0)
    kept_back = worse > 0 and share in ("few", "more")
    assert bool(held[(foreign == 0) & (r >= 0.01)].any()) == (schedule > 0 or kept_back)


@pytest.mark.parametrize("distribution", [True, False])
def test_the_start_is_no_judge_in_a_context_that_is_new_to_it(distribution):
    """What it would never have said there is selected and held to the teacher as if it were within reach.

    So is an end at which the sampler goes on, if the teacher's distribution is here, where the student's own
    end takes its place; else it is held to the start. A token that the student alone says more often than
    the start did is a slip: after it the start judges, as before it.
    """
    table = reach_table()
    half = torch.arange(len(table)) % 2 == 0
    first, slips = table.position == 20, table.completion == 2
    new = (table.position > 20) & ~slips
    r = torch.where(half, 0.0, table.extra["reach"])
    foreign = torch.where(torch.arange(len(table)) % 8 == 1, 1.0 - r, 0.0)
    initial = table.extra["student_logprobs"] - torch.where(first, 2.4, 2.2)
    teacher = table.extra["student_logprobs"] - torch.where(first & slips, 0.2, 0.0)
    models = {"initial_logprobs": initial, "teacher_logprobs": teacher}
    extra = table.extra | {"reach": r, "foreign": foreign} | models
    table = replace(table, extra=extra)
    args = config(method="reach", budget=0.3, anchor_fraction=0.5)
    choice = choose(table, args, step=0, training=True, num_steps=400, distribution=distribution)
    kept, drawn = choice.selection.kept, choice.reference_mask
    assert bool(kept[half & new].any()) and not bool(kept[half & ~new].any())
    to_start = choice.anchor_weights > 0
    expected = new & (foreign > 0) & (not distribution)
    assert torch.equal(to_start[drawn & new], expected[drawn & new])
    assert bool(to_start[drawn & half & ~new].all())
    assert bool((drawn & new & (foreign > 0)).any()), "vacuous"
    # A teacher that gives its distribution teaches by r itself: the rest has the forward KL.
    expected = r if distribution else torch.where(new, 1.0 - foreign, r)
    torch.testing.assert_close(choice.reach, expected)


@pytest.mark.parametrize(("step", "schedule"), [(0, 1.0), (120, 0.4), (399, 0.0)])
def test_what_the_hold_takes_back_is_selected_last(step, schedule):
    """D~ (1 - h)^2 from the definition: h falls with lambda, foreign ends stay in it."""
    table, args = reach_table(), config(method="reach", budget=0.2)
    r = table.extra["reach"]
    foreign = 0.9 * (1.0 - r) * (torch.arange(len(table)) % 3 == 0)
    # No context is new: lambda is that of the schedule.
    extra = table.extra | {"foreign": foreign, "initial_logprobs": table.extra["student_logprobs"]}
    table = replace(table, extra=extra)
    choice = choose(table, args, step=step, training=True, num_steps=400)
    kept, _, _ = rule_by_definition(table, args, choice.reference_mask.tolist(), schedule)
    found = choice.selection.kept
    assert set(found.nonzero().flatten().tolist()) == kept
    # The C of the logs is r all the same.
    torch.testing.assert_close(
        choice.selection.incompatible, choice.selection.d - choice.selection.learnable
    )
    by_reach = choose(table, replace(args, selector="teachability_raw_c"), step=step, training=True)
    assert not torch.equal(found, by_reach.selection.kept), "vacuous"


def test_all_within_reach_is_distillation_everywhere_and_a_hold_that_does_nothing():
    """threshold 0: r = 1, so that D alone ranks and the drawn tokens are all taught."""
    table = all_known(reach_table())
    ones = torch.ones_like(table.disagreement)
    extra = table.extra | {"reach": ones, "foreign": 0.0 * ones}
    table = replace(table, extra=extra, compatibility=ones)
    choice = choose(table, config(method="reach"), step=1, training=True)
    assert not bool(choice.anchor_weights.any())
    drawn = choice.reference_mask
    assert bool((choice.loss_weights[drawn] > 0).all()) and bool(drawn.any())
    kept, others = choice.selection.kept, table.valid & ~choice.selection.kept
    assert table.disagreement[kept].min() >= table.disagreement[others].max()


@pytest.mark.parametrize("lowest", [1.0 - 1e-7, 0.999, 0.9])
def test_an_r_that_hardly_varies_drops_no_large_disagreement(lowest):
    """In a real pair r of 90 % of the tokens is 0.9996 to 1: a scale of the batch would make 0.999 a 0."""
    table, n = all_known(reach_table()), 20
    generator = torch.Generator().manual_seed(0)
    r = lowest + (1.0 - lowest) * torch.rand(len(table), generator=generator).double()
    best = torch.where(table.valid, table.disagreement, -1.0).topk(n).indices
    r[best] = lowest
    disagreement = table.disagreement.clone()
    disagreement[best] *= 2.0
    extra = table.extra | {"reach": r, "foreign": 0.0 * r}
    table = replace(table, disagreement=disagreement, compatibility=r, extra=extra)
    budget = n / int(table.valid.sum())
    # The largest 5 % have one D~, so that the scale must not saturate here.
    args = config(method="reach", budget=budget, normalization="minmax")
    kept = choose(table, args, step=1, training=True).selection.kept
    assert set(kept.nonzero().flatten().tolist()) == set(best.tolist())


@pytest.mark.parametrize("weighting", ["score", "rank", "entropy"])
@pytest.mark.parametrize("floor", [False, True])
def test_what_a_token_weighs_says_nothing_about_the_budget(weighting, floor):
    """A weighted mean, lowered by the unused part of the budget: a count of tokens, whatever they weigh."""
    table = reach_table(floor=floor)
    args = config(method="reach", budget=0.2, weighting=weighting)
    choice = choose(table, args, step=4, training=True)
    selection = choice.selection
    assert (selection.num_kept < selection.num_budget) == floor
    used = selection.num_kept / selection.num_budget
    assert float(choice.loss_weights[selection.kept].sum()) == pytest.approx(used, rel=1e-9)
    assert len(choice.loss_weights[selection.kept].unique()) > 5, "vacuous"


def test_a_factor_on_a_teacher_is_one_on_its_hold_too():
    """What is held towards a teacher is its teaching; what is held at the start is not."""
    table = reach_table()
    teacher = (torch.arange(len(table)) % 2).double()
    table = replace(table, extra=table.extra | {"teacher": teacher})
    args = config(method="reach", budget=0.2)
    plain, halved = (
        choose(table, args, step=4, training=True, teacher_weights=weights)
        for weights in ((), (1.0, 0.5))
    )
    factor = torch.where(teacher == 1, 0.5, 1.0)
    torch.testing.assert_close(halved.loss_weights, plain.loss_weights * factor)
    assert torch.equal(halved.anchor_weights, plain.anchor_weights)
    drawn = plain.reference_mask & (teacher == 1)
    assert bool((plain.loss_weights[drawn] > 0).any()), "vacuous"


def test_a_budget_of_one_is_full_distillation():
    """Every token is selected, below the floor too: there is no other token to hold."""
    choice = choose(
        reach_table(floor=True), config(method="reach", budget=1.0), step=0, training=True
    )
    valid = reach_table().valid
    assert torch.equal(choice.selection.kept, valid) and not bool(choice.anchor_weights.any())
    expected = valid.double() / valid.sum()
    torch.testing.assert_close(choice.loss_weights, expected)


def test_nothing_worth_teaching_leaves_the_hold():
    table = reach_table()
    table = replace(table, disagreement=table.disagreement * 1e-3)
    choice = choose(table, config(method="reach"), step=0, training=True)
    assert choice.selection.num_kept == 0 and bool(choice.trains.any())


def test_evaluation_compares_every_token_with_the_teacher():
    table = reach_table()
    choice = choose(table, config(method="reach"), step=0, training=False)
    torch.testing.assert_close(choice.loss_weights, table.valid.double() / table.valid.sum())
    assert not bool(choice.anchor_weights.any())


@pytest.mark.parametrize("floor", [False, True])
def test_ranks_that_hold_parts_choose_as_one(floor):
    """Nothing is gathered: counts and order statistics alone; denominators are global."""
    table, args = reach_table(seed=2, floor=floor), config(method="reach", budget=0.2)
    # New contexts from position 40 on, and worse: lambda is a number of all ranks too.
    initial = table.extra["student_logprobs"] - torch.where(table.position == 40, 2.4, 2.2)
    disagreement = table.disagreement * torch.where(table.position > 40, 3.0, 1.0)
    extra = table.extra | {"initial_logprobs": initial}
    table = replace(table, disagreement=disagreement, extra=extra)
    whole = choose(table, args, step=90, training=True, num_steps=100)
    assert lambda_by_definition(table, 0.0) > 0.0, "vacuous"
    expected, parts = (
        selection_metrics(table, whole.selection, whole.budget, whole.shadows),
        split(table, [1, 3]),
    )

    def on_rank(ranks, part):
        part = replace(part, ranks=ranks)
        choice = choose(part, args, step=90, training=True, num_steps=100)
        return choice, selection_metrics(part, choice.selection, choice.budget, choice.shadows)

    found = World(len(parts)).run(on_rank, parts)
    for name in ("loss_weights", "anchor_weights", "reference_mask"):
        joined = torch.cat([getattr(choice, name) for choice, _ in found])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=0)
    for _, metrics in found:
        assert metrics == pytest.approx(expected, rel=1e-9)


# settings


def test_what_the_method_stands_for_and_what_wins_over_it():
    made = config(method="reach")
    assert (made.compatibility, made.anchor_coef) == ("reach", 3.0)
    assert (made.anchor_fraction, made.anchor_responses) == (0.1, 1.0)
    assert reads_initial(made) and gather_options(made)["columns"] == (
        "reach",
        "foreign",
        "initial_logprobs",
        "student_logprobs",
        "teacher_logprobs",
        "teacher",
    )
    other = config(method="reach", compatibility="mass", anchor_coef=1.0, anchor_fraction=0.3)
    assert (other.compatibility, other.anchor_coef, other.anchor_fraction) == ("mass", 1.0, 0.3)
    assert reads_initial(other) and reads_initial(config(compatibility="reach"))
    anchored = config(method="anchored")
    assert not reads_initial(anchored) and anchored.compatibility == "mass"
    trls = DistillationConfig(output_dir="runs/x", bf16=False, use_cpu=True)
    assert TeachabilityConfig.of(trls, "a/b").compatibility == "reach"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"method": "reach", "reduction": "sample_mean"}, "token_mean"),
        ({"method": "reached"}, "Did you mean 'reach'"),
        ({"reach_threshold": -0.1}, "reach_threshold=-0.1"),
        ({"reach_threshold": 1.5}, "reach_threshold=1.5"),
    ],
)
def test_what_is_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        config(**values)


def test_reach_without_an_initial_student_is_refused_in_words():
    signals = signals_from_logprobs(logprobs(4, 0), logprobs(4, 1), torch.zeros(4).long(), k=3)
    place = {"completion": torch.zeros(4).long(), "position": torch.arange(4)}
    valid = torch.ones(4, dtype=torch.bool)
    for each in (signals, lists_from_exact(signals)):
        with pytest.raises(ConfigError, match=r"initial student.*only training"):
            signal_table(each, **place, valid=valid, compatibility="reach")
        with pytest.raises(ConfigError, match=r"initial student.*only training"):
            signal_table(each, **place, valid=valid, needs=("reach",))


@pytest.mark.parametrize("all_of_it", [{"budget": 1.0}, {"selector": "full", "budget": 0.1}])
def test_where_everything_is_asked_for_it_is_plain_distillation(all_of_it):
    """A method that leaves tokens out must not turn "all" into something else, nor run a model for it."""
    args = config(method="reach", **all_of_it)
    assert not reads_initial(args) and args.compatibility == "mass"
    table = random_table(40, seed=3)
    choice = choose(table, args, step=0, training=True)
    count = int(table.valid.sum())
    assert torch.equal(choice.selection.kept, table.valid)
    torch.testing.assert_close(choice.loss_weights, table.valid.to(choice.loss_weights) / count)
    assert not choice.anchor_weights.any()
