"""Top-K list metrics against the oracle, R1-R6 and the vectors of docs/released-code.md."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_lists import token_metrics
from torch.testing import assert_close

from taopd.errors import ConfigError, ShapeError
from taopd.signals import LIBM, TORCH, list_metrics, topk_lists_signals
from taopd.signals.topk_lists import BLOCK_ROWS

INF, NAN = math.inf, math.nan
OURS = {
    "KLf_union": "disagreement",
    "KLr_union": "reverse_disagreement",
    "CBC": "bhattacharyya",
    "Cmass": "compatibility",
    "Cmass_topk": "compatibility_bound",
    "Coverlap": "overlap",
    "Hs_topk": "student_entropy_nats",
    "Ht_topk": "teacher_entropy_nats",
    "Hs_topk_norm": "student_entropy",
    "Ht_topk_norm": "teacher_entropy",
    "student_topk_mass": "student_mass",
    "teacher_topk_mass": "teacher_mass",
    "reach_t1": "teacher_best_reached",
    "target_student_rank": "student_target_rank",
    "target_teacher_rank": "teacher_target_rank",
}


def padded(lists, width):
    """[[(logprob, id), ...], ...] -> ids [N, width], log-probs [N, width]."""
    ids = [[token for _, token in row] + [-1] * (width - len(row)) for row in lists]
    logprobs = [[x for x, _ in row] + [-INF] * (width - len(row)) for row in lists]
    shape = (len(lists), width)
    return (
        torch.tensor(ids, dtype=torch.int64).reshape(shape),
        torch.tensor(logprobs, dtype=torch.float64).reshape(shape),
    )


def metrics_of(student, teacher, k, **more):
    width = max(1, *(len(row) for row in student + teacher))
    return list_metrics(*padded(student, width), *padded(teacher, width), k=k, **more)


def listed(probs):
    """{id: probability} -> [(log-prob, id), ...]."""
    return [(math.log(p), token) for token, p in probs.items()]


logprobs = st.one_of(st.floats(-12, 0), st.sampled_from([NAN, -INF, INF, -1.0, -800.0]))
one_list = st.lists(st.tuples(logprobs, st.integers(0, 9)), max_size=6)


@st.composite
def positions(draw):
    count = draw(st.integers(1, 6))
    rows = st.lists(one_list, min_size=count, max_size=count)
    targets = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    return draw(rows), draw(rows), targets


@given(positions(), st.sampled_from([TORCH, LIBM]))
@settings(deadline=None, max_examples=150)
def test_every_metric_matches_the_oracle(case, arithmetic):
    """Short, empty, unsorted lists, repeated ids, non-finite and underflowing entries included."""
    student, teacher, targets = case
    ours = metrics_of(student, teacher, 6, target_ids=torch.tensor(targets), arithmetic=arithmetic)
    for row, (s, t, target) in enumerate(zip(student, teacher, targets, strict=True)):
        truth = token_metrics(s, t, 6, target=target)
        for name, field in OURS.items():
            expected = float(truth[name] or 0)
            found = float(getattr(ours, field)[row])
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@given(positions())
@settings(deadline=None)
def test_laws_of_the_geometry(case):
    student, teacher, _ = case
    ours = metrics_of(student, teacher, 6)
    swapped = metrics_of(teacher, student, 6)
    assert_close(ours.disagreement, swapped.reverse_disagreement)
    assert_close(ours.bhattacharyya, swapped.bhattacharyya)
    assert_close(ours.overlap, swapped.overlap)
    assert (ours.disagreement >= -1e-9).all() and (ours.reverse_disagreement >= -1e-9).all()
    for column in (ours.compatibility, ours.overlap, ours.jaccard, ours.student_entropy):
        assert ((column >= 0) & (column <= 1 + 1e-12)).all()


def test_method_vector_of_the_worked_example():
    ours = metrics_of([listed({1: 0.7, 2: 0.2})], [listed({2: 0.6, 3: 0.3})], 2)
    expected = {
        "disagreement": 9.576544468171505,
        "reverse_disagreement": 21.051191359550945,
        "bhattacharyya": 0.38490163872712346,
        "compatibility": 0.6,
        "overlap": 0.5,
        "student_entropy_nats": 0.5297061990576546,
        "student_entropy": 0.7642045065086204,
        "jaccard": 1 / 3,
    }
    for name, value in expected.items():
        assert float(getattr(ours, name)) == pytest.approx(value, rel=1e-12), name


def test_method_vector_of_disjoint_lists():
    ours = metrics_of([listed({5: 0.5, 6: 0.25})], [listed({7: 0.5, 8: 0.25})], 2)
    assert float(ours.disagreement) == pytest.approx(26.99450694757997, rel=1e-12)
    assert float(ours.compatibility) == 0


@pytest.mark.parametrize("arithmetic", [TORCH, LIBM])
def test_method_vector_of_identical_lists(arithmetic):
    row = [listed({5: 0.5, 6: 0.25})]
    ours = metrics_of(row, [row[0][::-1]], 2, arithmetic=arithmetic)
    assert float(ours.disagreement) == 0 == float(ours.reverse_disagreement)
    assert float(ours.bhattacharyya) == pytest.approx(1, abs=1e-15)
    assert float(ours.compatibility) == 0.75
    assert float(ours.overlap) == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_r1_non_finite_entries_are_dropped_and_the_list_is_compacted(bad):
    clean = listed({4: 0.5, 6: 0.25})
    ours = metrics_of([[clean[0], (bad, 5), clean[1]]], [clean], 3, target_ids=torch.tensor([6]))
    assert ours.student_ids.tolist() == [[4, 6, -1]]
    assert ours.student_logprobs[0, 2] == -INF
    assert float(ours.disagreement) == 0
    assert int(ours.student_target_rank) == 2


def test_r1_an_empty_list_is_an_empty_support():
    ours = metrics_of([[], [(NAN, 3)]], [listed({1: 0.5}), []], 2)
    for name in ("disagreement", "bhattacharyya", "compatibility", "overlap", "student_entropy"):
        assert getattr(ours, name).tolist() == [0, 0], name
    assert ours.teacher_best_reached.tolist() == [False, False]


def test_r2_exact_mass_replaces_the_bound_and_a_missing_id_counts_zero():
    student, teacher = listed({1: 0.5, 2: 0.3, 3: 0.1}), listed({2: 0.6})
    ours = metrics_of(
        [student],
        [teacher],
        3,
        teacher_logprobs_at_student_ids=torch.tensor([[math.log(0.05), math.log(0.6), NAN]]),
    )
    assert float(ours.compatibility) == pytest.approx(0.65)
    assert float(ours.compatibility_bound) == pytest.approx(0.6)
    assert (
        ours.compatibility_is_exact
        and not metrics_of([student], [teacher], 3).compatibility_is_exact
    )


def test_r2_exact_mass_follows_compaction_and_is_clamped():
    known = torch.tensor([[0.0, math.log(0.4), math.log(0.9)]])
    student = [(NAN, 1), (-1.0, 2), (-2.0, 3)]
    ours = metrics_of([student], [[]], 3, teacher_logprobs_at_student_ids=known)
    assert float(ours.compatibility) == 1  # 0.4 + 0.9; the dropped entry's 1.0 is not in it
    known[0, 2] = math.log(0.2)
    ours = metrics_of([student], [[]], 3, teacher_logprobs_at_student_ids=known)
    assert float(ours.compatibility) == pytest.approx(0.6)


def test_r3_no_mass_on_one_side_gives_zero_divergence():
    ours = metrics_of([[(-800.0, 1)]], [listed({1: 0.9})], 1)
    assert float(ours.disagreement) == float(ours.reverse_disagreement) == 0
    assert float(ours.bhattacharyya) == 0


def test_r3_probabilities_are_floored_and_not_renormalized():
    ours = metrics_of([listed({1: 1.0})], [listed({2: 1.0})], 1)
    assert float(ours.disagreement) == pytest.approx((1 - 1e-12) * -math.log(1e-12))


def test_r4_entropy_of_one_entry_is_zero_and_two_even_ones_is_one():
    ours = metrics_of([listed({1: 0.9}), listed({1: 0.2, 2: 0.2})], [[], []], 2)
    assert ours.student_entropy.tolist() == [0, 1]
    assert float(ours.student_entropy_nats[1]) == pytest.approx(math.log(2))


def test_r5_overlap_divides_by_the_configured_k():
    row = listed({1: 0.5, 2: 0.2})
    assert float(metrics_of([row], [row], 8).overlap) == 2 / 8


def test_r6_ranks_are_one_based_and_zero_stands_for_none():
    ours = metrics_of(
        [listed({7: 0.5, 8: 0.2})] * 2, [listed({9: 0.5})] * 2, 2, target_ids=torch.tensor([8, 9])
    )
    assert ours.student_target_rank.tolist() == [2, 0]
    assert ours.teacher_target_rank.tolist() == [0, 1]


def test_a_repeated_id_keeps_its_first_place_and_last_value():
    twice = [(-1.0, 4), (-2.0, 5), (-3.0, 4)]
    ours = metrics_of([twice], [[(-3.0, 4), (-2.0, 5)]], 3, target_ids=torch.tensor([5]))
    assert float(ours.student_mass) == pytest.approx(math.exp(-3) + math.exp(-2))
    assert float(ours.disagreement) == 0
    assert int(ours.student_target_rank) == 2


def test_more_reach_the_same_numbers_in_blocks():
    """Blocks are a matter of speed: the values must not depend on where they are cut."""
    num_rows, k = BLOCK_ROWS + 37, 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_rows, 9, generator=generator).argsort(1)
    values = -torch.rand(num_rows, 2 * k, generator=generator, dtype=torch.float64) * 5
    columns = (ids[:, :k], values[:, :k], ids[:, k - 1 : 2 * k - 1], values[:, k:])
    whole = topk_lists_signals(*columns, k=k)
    tail = topk_lists_signals(*(column[BLOCK_ROWS - 5 :] for column in columns), k=k)
    assert_close(whole.disagreement[BLOCK_ROWS - 5 :], tail.disagreement, rtol=1e-13, atol=1e-15)
    assert len(whole) == num_rows and whole.student_topk_ids.shape == (num_rows, k)


def test_both_arithmetics_agree_to_the_last_bits():
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(300, 12, generator=generator).argsort(1)
    values = -torch.rand(300, 16, generator=generator, dtype=torch.float64) * 8
    columns = (ids[:, :8], values[:, :8], ids[:, 4:], values[:, 8:])
    fast, exact = (list_metrics(*columns, k=8, arithmetic=a) for a in (TORCH, LIBM))
    for field in OURS.values():
        if not field.endswith("rank"):
            a, b = getattr(fast, field).double(), getattr(exact, field).double()
            assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_signals_are_the_metrics_a_selector_reads():
    row, other = [listed({1: 0.7, 2: 0.2})], [listed({2: 0.6, 3: 0.3})]
    metrics = metrics_of(row, other, 2)
    signals = topk_lists_signals(*padded(row, 2), *padded(other, 2), k=2)
    assert_close(signals.disagreement, metrics.disagreement)
    assert_close(signals.entropy, metrics.student_entropy)
    assert_close(signals.compatibility_bound, metrics.compatibility_bound)
    assert signals.forward_kl is None and signals.student_logprobs is None


def test_no_positions_give_empty_columns():
    ids, values = padded([], 4)
    assert len(topk_lists_signals(ids, values, ids, values, k=4)) == 0


def test_wrong_shapes_and_k_are_named():
    ids, values = padded([[(-1.0, 1), (-2.0, 2)]], 2)
    with pytest.raises(ConfigError, match="k=0"):
        topk_lists_signals(ids, values, ids, values, k=0)
    with pytest.raises(ShapeError, match="at least one column"):
        topk_lists_signals(ids[:, :0], values[:, :0], ids[:, :0], values[:, :0], k=2)
