"""Selectors from the work around the paper, against loops in plain Python over each completion."""

import math
from dataclasses import replace

import pytest
import torch
from selector_tables import random_table

from taopd.errors import ConfigError
from taopd.selectors import SELECTORS, normalized_view, select
from taopd.selectors.registry import Selector
from taopd.selectors.resolve import resolve_selector
from taopd.selectors.select import seeded_generator
from taopd.signals import SignalTable


def responses(table):
    """Per completion: row numbers in the order of position, all and valid ones."""
    for completion in sorted(set(table.completion.tolist())):
        rows = [i for i, r in enumerate(table.completion.tolist()) if r == completion]
        rows.sort(key=lambda i: table.position[i].item())
        yield rows, [i for i in rows if table.valid[i]]


def scores_of(name, table, **settings):
    view = normalized_view(table, generator=seeded_generator(0, 0), **settings)
    return resolve_selector(name).scores(view)


def logprobs(table):
    return table.extra["student_logprobs"].tolist(), table.extra["teacher_logprobs"].tolist()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_dial_is_the_logarithmic_mean_form(beta):
    table = random_table()
    found = scores_of(f"dial(beta={beta})", table)
    for row, (s, t) in enumerate(zip(*logprobs(table), strict=True)):
        p, q = math.exp(s), math.exp(t)
        mean = (q - p) / (math.log(q) - math.log(p))  # logarithmic mean of p and q
        assert found[row].item() == pytest.approx(mean**beta * abs(t - s), rel=1e-9)
    assert torch.equal(scores_of("dial", table), scores_of("dial(beta=1)", table))


def test_plain_columns_and_their_direction():
    table = random_table()
    for name, signal in (
        ("pgt", "log_ratio_variance"),
        ("ier", "ier"),
        ("reverse_kl", "reverse_kl"),
    ):
        assert torch.equal(scores_of(name, table), table.extra[signal])
    assert torch.equal(scores_of("corrective", table), table.extra["corrective_mass"])
    kept = select(table, selector="opsa", budget=0.2).kept
    s = table.extra["student_logprobs"]
    assert s[kept].max() <= s[table.valid & ~kept].min()  # the least likely tokens


def test_raw_c_is_a_share_of_mass():
    """D~ C with C as it is, so that a C which hardly varies changes no order."""
    table = random_table()
    low, high = (table.disagreement[table.valid].quantile(q).item() for q in (0.05, 0.95))
    found = scores_of("teachability_raw_c", table)
    for row in table.valid.nonzero().flatten().tolist():
        d = min(1.0, max(0.0, (table.disagreement[row].item() - low) / (high - low + 1e-12)))
        assert found[row].item() == pytest.approx(d * table.compatibility[row].item(), rel=1e-9)
    assert not bool(found[~table.valid].any())
    near = 1.0 - 1e-6 * table.compatibility
    saturated = replace(table, compatibility=near)
    kept = [
        select(saturated, selector=name, budget=0.05).kept
        for name in ("teachability_raw_c", "divergence", "teachability")
    ]
    dropped = [int((kept[1] & ~each).sum()) for each in kept]
    assert dropped[0] <= 1 < dropped[2]


def test_bottom_is_the_other_end_of_teachability():
    table = random_table(masked=0.0)
    top = select(table, budget=0.25, normalization="minmax")
    bottom = select(table, selector="bottom", budget=0.75, normalization="minmax")
    assert torch.equal(top.kept, ~bottom.kept)


def test_prefix_keeps_the_first_positions_of_every_response():
    table = random_table(200, 4, masked=0.0)
    kept = select(table, selector="prefix", budget=0.1).kept
    assert torch.equal(kept, table.position < 5)


def test_compatible_draws_at_random_above_the_threshold_and_tops_up_with_the_best():
    table = random_table(400, 4, masked=0.1)
    c, valid = table.compatibility, table.valid
    above = valid & (c > 0.9)
    few = select(table, selector="compatible", budget=0.02).kept
    assert (c[few] > 0.9).all() and few.sum() < above.sum()
    times = sum(
        select(table, selector="compatible", budget=0.02, step=step).kept.double()
        for step in range(600)
    )
    share = float(few.sum()) / float(above.sum())
    spread = math.sqrt(600 * share * (1 - share))
    assert (times[above] - 600 * share).abs().max() < 5 * spread  # each one equally often
    many = select(table, selector="compatible", budget=0.5).kept
    assert many[above].all()
    rest = many & ~above
    assert c[rest].min() >= c[valid & ~many].max()
    wider = select(table, selector="compatible(threshold=0.5)", budget=0.02, step=3).kept
    assert (c[wider] > 0.5).all() and (c[wider] <= 0.9).any()


def test_the_gate_prefers_accepted_tokens_and_weighs_the_others_a_hundredth():
    table = random_table()
    accepted = table.extra["student_top1_accepted"] == 1
    ours = select(table, selector="selectkd", budget=0.2)
    assert accepted[ours.kept].all()
    everything = select(table, selector="selectkd", budget=1.0)
    expected = torch.where(accepted, 1.0, 0.01).double() * table.valid
    assert torch.equal(everything.weights, expected)


def test_iw_falls_by_the_share_of_the_gap_already_met():
    table = random_table(120, 4)
    found = scores_of("iw(gamma=0.7)", table)
    s, t = logprobs(table)
    for _, valid in responses(table):
        size = [abs(t[i] - s[i]) for i in valid]
        for place, row in enumerate(valid):
            expected = 1 + 0.7 * (1 - sum(size[:place]) / sum(size))
            assert found[row].item() == pytest.approx(expected, rel=1e-9)
    ours = select(table, selector="iw", budget=1.0)
    assert torch.allclose(ours.weights[table.valid], scores_of("iw", table)[table.valid])


def test_pw_rises_along_the_response():
    table = random_table(60, 3)
    found = scores_of("pw", table)
    for rows, _ in responses(table):
        last = max(table.position[i].item() for i in rows)
        for row in rows:
            place = table.position[row].item() / last
            expected = 0.25 + 0.75 / (1 + math.exp(-(place - 0.30) / 0.10))
            assert found[row].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("masked", [0, 5])
def test_fire_drops_responses_and_weighs_sure_teachers_and_unsure_students(masked):
    table = random_table(300 + 30 * masked, 10 + masked)
    # Completions that were cut off and may not train are none of those that a fifth is dropped of.
    table.valid[300:] = False
    found = scores_of("fire(alpha=2, beta=0.5)", table)
    teacher_h, student_h = table.extra["teacher_entropy"], table.entropy
    largest_t, largest_s = teacher_h[table.valid].max(), student_h[table.valid].max()
    _, t = logprobs(table)
    means = []
    for rows, valid in responses(table):
        if valid:
            means.append((sum(t[i] for i in valid) / len(valid), rows))
    dropped = {i for _, rows in sorted(means)[:2] for i in rows}
    for row in range(300):
        if table.valid[row]:
            weight = (1 + 2 * (1 - teacher_h[row] / largest_t)) * (
                1 + 0.5 * student_h[row] / largest_s
            )
            expected = 0.0 if row in dropped else weight.item()
            assert found[row].item() == pytest.approx(expected, rel=1e-9)


def test_sure_weighs_unlikely_tokens_up_to_double():
    table = random_table()
    s, _ = logprobs(table)
    for found, logprob in zip(scores_of("sure", table).tolist(), s, strict=True):
        assert found == pytest.approx(2 - math.exp(logprob), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_bellman_is_a_discounted_mean_of_what_follows(gamma):
    table = random_table(80, 4)
    found = scores_of(f"bellman(teachability, gamma={gamma})", table)
    assert torch.equal(found, scores_of(f"bellman(gamma={gamma})", table))
    value = scores_of("teachability", table)
    s, t = logprobs(table)
    for _, valid in responses(table):
        for place, row in enumerate(valid):
            total, steps, factor = 0.0, 0.0, 1.0
            for later in valid[place:]:
                total, steps = total + factor * value[later].item(), steps + factor
                factor *= gamma * min(math.exp(t[later] - s[later]), 1.0)
            assert found[row].item() == pytest.approx(total / steps, rel=1e-9)


def test_dash_hands_credit_back():
    table = random_table(80, 4)
    found = scores_of("dash(kappa=0.8)", table)
    s, t = logprobs(table)
    gap = [b - a for a, b in zip(s, t, strict=True)]
    mean = sum(g for g, v in zip(gap, table.valid, strict=True) if v) / int(table.valid.sum())
    for _, valid in responses(table):
        future = 0.0
        for row in reversed(valid):
            future = gap[row] + future / (1 + math.exp(0.8 * (gap[row] - mean)))
            assert found[row].item() == pytest.approx(abs(future), rel=1e-9)


# needs


def test_a_table_without_the_signal_refuses_the_selector_and_names_what_it_is_enough_for():
    table = random_table()
    bare = SignalTable(
        disagreement=table.disagreement,
        compatibility=table.compatibility,
        entropy=table.entropy,
        completion=table.completion,
        position=table.position,
        valid=table.valid,
        extra={"student_logprobs": table.extra["student_logprobs"]},
    )
    for name, rule in SELECTORS.items():
        missing = set(rule.needs) - {"student_logprobs"}
        if missing:
            with pytest.raises(ConfigError, match=f"{min(missing)}.*Possible without.*opsa"):
                select(bare, selector=name)
        else:
            select(bare, selector=name)
    undeclared = Selector(name="mine", scores=lambda view: view.signal("ier"))
    with pytest.raises(ConfigError, match="declare needs="):
        select(bare, selector=undeclared)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_declared_needs_are_all_that_is_read(name):
    table = random_table()
    rule = SELECTORS[name]
    exact = SignalTable(
        disagreement=table.disagreement,
        compatibility=table.compatibility,
        entropy=table.entropy,
        completion=table.completion,
        position=table.position,
        valid=table.valid,
        extra={need: table.extra[need] for need in rule.needs},
    )
    assert torch.equal(
        select(exact, selector=name, budget=0.1).kept, select(table, selector=name, budget=0.1).kept
    )
