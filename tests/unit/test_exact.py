"""Exact signals against the definitions, in plain Python floats and probability space."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.kernels import Head, TopKScores
from taopd.signals import exact_signals, signals_from_answer, signals_from_logprobs


def rows(num: int, vocab: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        sharpness * torch.randn(num, vocab, generator=generator, dtype=torch.float64)
    ).log_softmax(-1)


def signals_by_definition(student: list[float], teacher: list[float], k: int) -> dict[str, float]:
    """docs/math.md, one position, from two lists of probabilities."""
    top_s = set(sorted(range(len(student)), key=lambda v: -student[v])[:k])
    top_t = set(sorted(range(len(teacher)), key=lambda v: -teacher[v])[:k])
    union = top_s | top_t
    mass_s, mass_t = (sum(p[v] for v in union) for p in (student, teacher))
    s = {v: student[v] / mass_s for v in union}
    t = {v: teacher[v] / mass_t for v in union}
    return {
        "disagreement": sum(t[v] * math.log(t[v] / s[v]) for v in union),
        "reverse_disagreement": sum(s[v] * math.log(s[v] / t[v]) for v in union),
        "bhattacharyya": sum(math.sqrt(s[v] * t[v]) for v in union),
        "compatibility": sum(teacher[v] for v in top_s),
        "compatibility_bound": sum(teacher[v] for v in top_s & top_t),
        "entropy": -sum(p * math.log(p) for p in student),
        "teacher_entropy": -sum(p * math.log(p) for p in teacher),
        "overlap": len(top_s & top_t) / k,
        "jaccard": len(top_s & top_t) / len(union),
        "forward_kl": sum(q * math.log(q / p) for p, q in zip(student, teacher, strict=True)),
        "reverse_kl": sum(p * math.log(p / q) for p, q in zip(student, teacher, strict=True)),
    }


@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("sharpness", [0.1, 2.0, 8.0])
def test_every_signal_matches_its_definition(k, sharpness):
    student, teacher = rows(7, 11, 0, sharpness), rows(7, 11, 1, sharpness)
    found = signals_from_logprobs(student, teacher, torch.arange(7), k=k, full_kl=True)
    for row in range(7):
        expected = signals_by_definition(
            student[row].exp().tolist(), teacher[row].exp().tolist(), k
        )
        for name, value in expected.items():
            assert getattr(found, name)[row].item() == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("masked", ["both", "student"])
def test_an_id_of_probability_zero_adds_nothing(masked):
    """Log-probs of -inf: the same numbers as without these ids, where 0 log 0 = 0."""
    student, teacher = rows(5, 9, 0), rows(5, 9, 1)
    gap = torch.full((5, 3), -torch.inf, dtype=torch.float64)
    wide = [torch.cat([each, gap], 1) for each in (student, teacher)]
    if masked == "student":
        rest = rows(5, 3, 2).exp()
        wide[1] = torch.cat([teacher + math.log(0.5), (0.5 * rest).log()], 1)
    found = signals_from_logprobs(*wide, torch.zeros(5).long(), k=4, full_kl=True)
    plain = signals_from_logprobs(student, teacher, torch.zeros(5).long(), k=4, full_kl=True)
    if masked == "both":
        for name in ("disagreement", "entropy", "forward_kl", "compatibility", "jaccard"):
            torch.testing.assert_close(getattr(found, name), getattr(plain, name), msg=name)
    # Half of the teacher's mass is where the student has none.
    more = 0.0 if masked == "both" else math.log(2.0)
    torch.testing.assert_close(found.reverse_kl, plain.reverse_kl + more)


@pytest.mark.parametrize("num_listed", [1, 3, 5])
def test_a_list_of_the_teacher_that_is_shorter_than_k(num_listed):
    """As a server sends it whose other ids the student lacks: against sets of ids."""
    student, teacher, tokens = rows(20, 12, 0), rows(20, 12, 1), torch.zeros(20).long()
    whole = signals_from_logprobs(student, teacher, tokens, k=5)
    ids, logprobs = whole.teacher_topk_ids.clone(), whole.teacher_topk_logprobs.clone()
    ids[:, num_listed:], logprobs[:, num_listed:] = -1, -torch.inf
    at_teachers = student.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    asked = TopKScores(
        target_logprobs=student[:, 0],
        topk_logprobs=whole.student_topk_logprobs,
        topk_ids=whole.student_topk_ids,
        logsumexp=torch.zeros(20),
        entropy=whole.entropy,
        want_logprobs=at_teachers,
    )
    found = signals_from_answer(
        asked,
        tokens,
        target_logprobs=teacher[:, 0],
        topk_ids=ids,
        topk_logprobs=logprobs,
        want_logprobs=teacher.gather(1, whole.student_topk_ids),
    )
    for row in range(20):
        own, other = set(whole.student_topk_ids[row].tolist()), set(ids[row].tolist()) - {-1}
        union = sorted(own | other)
        p, q = (each[row, union].softmax(0) for each in (student, teacher))
        expected = {
            "jaccard": len(own & other) / len(union),
            "overlap": len(own & other) / 5,
            "disagreement": float((q * (q / p).log()).sum()),
            "bhattacharyya": float((p * q).sqrt().sum()),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[row]) == pytest.approx(value, abs=1e-12), name


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 30), st.data())
def test_laws(seed, vocab, data):
    k = data.draw(st.integers(1, vocab))
    student, teacher = rows(5, vocab, seed), rows(5, vocab, seed + 1)
    targets = torch.zeros(5, dtype=torch.long)
    found = signals_from_logprobs(student, teacher, targets, k=k)
    assert (found.disagreement >= 0).all()
    assert ((found.compatibility >= 0) & (found.compatibility <= 1)).all()
    assert (found.compatibility_bound <= found.compatibility + 1e-12).all()
    same = signals_from_logprobs(student, student, targets, k=k)
    assert same.disagreement.abs().max() < 1e-12
    assert (same.overlap == 1).all()
    permutation = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    permuted = signals_from_logprobs(student[:, permutation], teacher[:, permutation], targets, k=k)
    torch.testing.assert_close(permuted.disagreement, found.disagreement)
    torch.testing.assert_close(permuted.compatibility, found.compatibility)
    whole = signals_from_logprobs(student, teacher, targets, k=vocab, full_kl=True)
    torch.testing.assert_close(whole.disagreement, whole.forward_kl)
    torch.testing.assert_close(whole.compatibility, torch.ones(5, dtype=torch.float64))


def heads(vocab=23, student_width=5, teacher_width=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    student = Head(
        weight=torch.randn(vocab, student_width, generator=generator, dtype=dtype),
        scale=0.5,
        softcap=4.0,
    )
    teacher = Head(
        weight=torch.randn(vocab, teacher_width, generator=generator, dtype=dtype),
        bias=torch.randn(vocab, generator=generator, dtype=dtype),
    )
    return student, teacher


def logits_by_definition(hidden, head: Head, temperature: float) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_hidden_states_give_the_same_as_whole_rows(impl):
    student_head, teacher_head = heads()
    generator = torch.Generator().manual_seed(4)
    student_hidden = torch.randn(10, 5, generator=generator)
    teacher_hidden = torch.randn(10, 7, generator=generator)
    targets = torch.randint(23, (10,), generator=generator)
    found = exact_signals(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        targets,
        k=4,
        temperature=1.7,
        full_kl=True,
        impl=impl,
    )
    truth = signals_from_logprobs(
        logits_by_definition(student_hidden, student_head, 1.7).log_softmax(-1),
        logits_by_definition(teacher_hidden, teacher_head, 1.7).log_softmax(-1),
        targets,
        k=4,
        full_kl=True,
    )
    assert torch.equal(found.student_topk_ids, truth.student_topk_ids)
    for name in ("disagreement", "compatibility", "entropy", "forward_kl", "student_logprobs"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(truth, name), atol=1e-5, rtol=1e-4
        )


def test_no_position_gives_empty_signals():
    student_head, teacher_head = heads()
    found = exact_signals(
        torch.zeros(0, 5),
        student_head,
        torch.zeros(0, 7),
        teacher_head,
        torch.zeros(0, dtype=torch.long),
        k=4,
    )
    assert len(found) == 0 and found.student_topk_ids.shape == (0, 4)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_bad_logits_name_the_model_and_the_place(model, bad, impl):
    student_head, teacher_head = heads()
    hidden = {"student": torch.ones(6, 5), "teacher": torch.ones(6, 7)}
    hidden[model][4, 0] = bad
    with pytest.raises(NumericsError, match=f"the {model}'s logits are NaN or infinite at place 4"):
        exact_signals(
            hidden["student"],
            student_head,
            hidden["teacher"],
            teacher_head,
            torch.zeros(6, dtype=torch.long),
            k=2,
            impl=impl,
            locate="place {}".format,
        )


def test_shapes_and_k_are_checked():
    student_head, teacher_head = heads()
    targets = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match="larger than the vocabulary of 23"):
        exact_signals(torch.ones(2, 5), student_head, torch.ones(2, 7), teacher_head, targets, k=24)
    with pytest.raises(ShapeError, match="3 positions"):
        exact_signals(torch.ones(3, 5), student_head, torch.ones(2, 7), teacher_head, targets, k=2)
    narrow = Head(weight=teacher_head.weight[:20])
    with pytest.raises(ShapeError, match="cut both"):
        exact_signals(torch.ones(2, 5), student_head, torch.ones(2, 7), narrow, targets, k=2)
