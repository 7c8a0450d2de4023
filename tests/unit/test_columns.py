"""Further signals against their definitions, their laws, and what a source cannot give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_signals import (
    accepted,
    corrective_mass,
    information_to_error,
    information_to_error_by_sampling_theory,
    log_ratio_variance,
    margin,
)

from taopd.errors import ConfigError
from taopd.kernels import Head
from taopd.signals import (
    INITIAL_GIVES,
    KNOWN_SIGNALS,
    LISTS_GIVE,
    OF_THE_START,
    available_signals,
    exact_signals,
    lists_from_exact,
    signal_table,
    signals_from_logprobs,
    topk_lists_signals,
)

NEEDS = ("corrective_mass", "ier", "log_ratio_variance", "student_top1_accepted", "teacher_margin")


def rows(num, vocab, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def table_for(signals, needs=NEEDS):
    place = torch.arange(len(signals))
    return signal_table(
        signals, completion=place * 0, position=place, valid=place >= 0, needs=needs
    )


@pytest.mark.parametrize("k", [1, 3, 7, 11])
@pytest.mark.parametrize("sharpness", [0.3, 2.0, 9.0])
def test_signals_on_demand_match_their_definitions(k, sharpness):
    student, teacher = rows(9, 11, 0, sharpness), rows(9, 11, 1, sharpness)
    targets = torch.arange(9)
    extra = table_for(signals_from_logprobs(student, teacher, targets, k=k)).extra
    for row in range(9):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        expected = {
            "log_ratio_variance": None,
            "ier": information_to_error(p, q, k, int(targets[row])),
            "corrective_mass": corrective_mass(p, q, k),
            "student_top1_accepted": accepted(p, q, k),
            "teacher_margin": margin(p, q, k),
        }
        if sharpness < 9.0:  # beyond, the clip at 30 nats may bind
            expected["log_ratio_variance"] = log_ratio_variance(p, q, k)
        for name, value in expected.items():
            if value is not None:
                assert extra[name][row].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_ier_is_the_signal_to_noise_ratio_of_the_one_sample_gradient():
    student, teacher = rows(6, 8, 3, 1.0), rows(6, 8, 4, 1.0)
    signals = signals_from_logprobs(student, teacher, torch.zeros(6, dtype=torch.long), k=8)
    found = table_for(signals).extra["ier"]
    for row in range(6):
        p, q = student[row].exp().tolist(), teacher[row].exp().tolist()
        assert found[row].item() == pytest.approx(
            information_to_error_by_sampling_theory(p, q), rel=1e-8
        )


@given(st.integers(0, 10_000), st.integers(2, 20), st.data())
@settings(deadline=None, max_examples=40)
def test_laws(seed, vocab, data):
    k = data.draw(st.integers(1, vocab))
    student, teacher = rows(5, vocab, seed), rows(5, vocab, seed + 1)
    targets = torch.arange(5) % vocab
    extra = table_for(signals_from_logprobs(student, teacher, targets, k=k)).extra
    same = table_for(signals_from_logprobs(student, student, targets, k=k)).extra
    for name in ("log_ratio_variance", "ier", "corrective_mass"):
        assert (extra[name] >= 0).all() and extra[name].isfinite().all()
        assert same[name].abs().max() < 1e-12, name
    assert (extra["corrective_mass"] <= extra["mass"] + 1e-12).all()
    assert (same["student_top1_accepted"] == 1).all()
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()  # where each id went
    permuted = signals_from_logprobs(student[:, order], teacher[:, order], place[targets], k=k)
    for name, column in table_for(permuted).extra.items():
        torch.testing.assert_close(column, extra[name], msg=name)


def test_extreme_teachers_give_finite_numbers():
    student = torch.tensor([[0.5, 0.5, 1e-300, 1e-300]], dtype=torch.float64).log()
    teacher = torch.tensor([[1e-300, 1e-200, 0.5, 0.5]], dtype=torch.float64).log()
    extra = table_for(signals_from_logprobs(student, teacher, torch.tensor([0]), k=2)).extra
    for name in NEEDS:
        assert extra[name].isfinite().all(), name


# what a source cannot give


def test_nothing_is_computed_that_nobody_asked_for():
    signals = signals_from_logprobs(rows(3, 9, 0), rows(3, 9, 1), torch.arange(3), k=2)
    extra = table_for(signals, needs=()).extra
    assert not set(extra) & set(NEEDS)
    assert {"student_logprobs", "teacher_logprobs", "teacher_entropy", "mass"} <= set(extra)


def test_a_signal_that_lists_cannot_give_is_refused_by_name():
    exact = signals_from_logprobs(rows(3, 9, 0), rows(3, 9, 1), torch.arange(3), k=2)
    lists = lists_from_exact(exact)
    assert available_signals(lists) == LISTS_GIVE
    for name in sorted(set(KNOWN_SIGNALS) - LISTS_GIVE - INITIAL_GIVES - OF_THE_START):
        with pytest.raises(ConfigError, match=f"{name}.*does not give.*corrective_mass"):
            table_for(lists, needs=(name,))
    bare = topk_lists_signals(
        exact.student_topk_ids,
        exact.student_topk_logprobs,
        exact.teacher_topk_ids,
        exact.teacher_topk_logprobs,
        k=2,
    )
    with pytest.raises(ConfigError, match="teacher_at_student_ids"):
        table_for(bare, needs=("corrective_mass",))
    with pytest.raises(ConfigError, match="Did you mean 'ier'"):
        table_for(exact, needs=("iet",))
    full = signals_from_logprobs(rows(3, 9, 0), rows(3, 9, 1), torch.arange(3), k=2, full_kl=True)
    assert available_signals(full) == set(KNOWN_SIGNALS) - INITIAL_GIVES - OF_THE_START


# stop class


def merged_rows(logprobs, stop_ids):
    """The distribution in which all stop ids are the first of them; the others are gone."""
    probs = logprobs.exp().clone()
    probs[:, stop_ids[0]] = probs[:, stop_ids].sum(1)
    keep = [v for v in range(probs.shape[1]) if v not in stop_ids[1:]]
    return probs[:, keep].log(), keep


@pytest.mark.parametrize("stop_ids", [(2, 5), (7, 0, 3), (4,)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_merging_stop_ids_is_scoring_the_merged_distributions(stop_ids, k):
    student, teacher = rows(40, 9, 5), rows(40, 9, 6)
    targets = torch.arange(40) % 9
    found = signals_from_logprobs(student, teacher, targets, k=k, full_kl=True, stop_ids=stop_ids)
    small_student, keep = merged_rows(student, list(stop_ids))
    small_teacher, _ = merged_rows(teacher, list(stop_ids))
    named = [stop_ids[0] if v in stop_ids else v for v in targets.tolist()]
    small_targets = torch.tensor([keep.index(v) for v in named])
    truth = signals_from_logprobs(small_student, small_teacher, small_targets, k=k, full_kl=True)
    assert found.token_ids.tolist() == named
    ids = torch.tensor(keep)
    for name in type(truth).__dataclass_fields__:
        expected, got = getattr(truth, name), getattr(found, name)
        if name.endswith("topk_ids"):
            assert torch.equal(got, ids[expected]), name
        elif name not in ("compatibility_is_exact", "token_ids"):
            torch.testing.assert_close(got, expected, msg=name)


def test_hidden_states_merge_like_whole_rows():
    generator = torch.Generator().manual_seed(1)
    heads = [Head(weight=torch.randn(23, d, generator=generator)) for d in (5, 7)]
    hidden = [torch.randn(10, d, generator=generator) for d in (5, 7)]
    targets = torch.randint(23, (10,), generator=generator)
    whole = [
        (h @ head.weight.T / 1.3).log_softmax(-1) for h, head in zip(hidden, heads, strict=True)
    ]
    options = {"k": 4, "full_kl": True, "stop_ids": (3, 11, 20)}
    found = exact_signals(
        hidden[0], heads[0], hidden[1], heads[1], targets, temperature=1.3, **options
    )
    truth = signals_from_logprobs(*whole, targets, **options)
    for name in type(truth).__dataclass_fields__:
        if name != "compatibility_is_exact":
            torch.testing.assert_close(
                getattr(found, name), getattr(truth, name), rtol=1e-4, atol=1e-5, msg=name
            )


def test_two_habits_of_stopping_agree_once_merged():
    student = torch.tensor([[0.9, 0.0001, 0.0999]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.0001, 0.9, 0.0999]], dtype=torch.float64).log()
    target = torch.tensor([0])
    apart = signals_from_logprobs(student, teacher, target, k=1)
    merged = signals_from_logprobs(student, teacher, target, k=1, stop_ids=(0, 1))
    assert apart.compatibility.item() < 0.001 and apart.disagreement.item() > 5
    assert merged.compatibility.item() > 0.9 and merged.disagreement.item() < 1e-9


def test_stop_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ConfigError, match="stop id 9"):
        signals_from_logprobs(rows(2, 9, 0), rows(2, 9, 1), torch.arange(2), k=2, stop_ids=(1, 9))
