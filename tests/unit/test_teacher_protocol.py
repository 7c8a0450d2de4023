"""What an answer must satisfy. Oracle: answers made true by construction, then broken in one place each."""

from dataclasses import replace

import pytest
import torch

from taopd.errors import TeacherError
from taopd.teachers import LocalTeacher, Teacher, TeacherScores, check_scores, join
from tests.conftest import make_model

VOCAB = 12


def true_answer(num_rows: int = 5, k: int = 4, seed: int = 0):
    """(scores, sampled tokens, wanted ids) of random distributions."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(num_rows, VOCAB, generator=generator).mul(2).log_softmax(-1)
    tokens = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    want = torch.stack([torch.randperm(VOCAB, generator=generator)[:3] for _ in range(num_rows)])
    top = full.topk(k, dim=1)
    scores = TeacherScores(
        logprobs=full.gather(1, tokens[:, None])[:, 0],
        topk_ids=top.indices,
        topk_logprobs=top.values,
        want_logprobs=full.gather(1, want),
    )
    return scores, tokens, want


def edited(scores: TeacherScores, name: str, row: int, column: int | None, value: float):
    values = getattr(scores, name).clone()
    if column is None:
        values[row] = value
    else:
        values[row, column] = value
    return replace(scores, **{name: values})


def test_a_true_answer_passes():
    for seed in range(20):
        scores, tokens, want = true_answer(seed=seed)
        check_scores(scores, tokens, want, VOCAB)
        check_scores(replace(scores, want_logprobs=None), tokens, None, VOCAB)


def test_log_probs_rounded_to_bfloat16_pass():
    """SGLang sends such: a list that holds nearly all mass then sums to more than 1."""
    highest = 0.0
    for seed in range(200):
        scores, tokens, want = true_answer(k=VOCAB, seed=seed)
        rounded = {
            name: getattr(scores, name).bfloat16().float()
            for name in ("logprobs", "topk_logprobs", "want_logprobs")
        }
        check_scores(replace(scores, **rounded), tokens, want, VOCAB)
        highest = max(highest, float(rounded["topk_logprobs"].exp().sum(1).max()))
    assert highest > 1.001, "vacuous: no rounded list had a mass above 1"


BROKEN = {
    "not finite": lambda s: edited(s, "logprobs", 2, None, float("nan")),
    "log-prob of the sampled token is above 0": lambda s: edited(s, "logprobs", 2, None, 0.5),
    "outside of the vocabulary": lambda s: edited(s, "topk_ids", 2, 3, VOCAB),
    "list is empty": lambda s: replace(
        s, topk_ids=s.topk_ids.clone().index_fill(0, torch.tensor([2]), -1)
    ),
    "list has a gap": lambda s: edited(s, "topk_ids", 2, 1, -1),
    "NaN or is above 0": lambda s: edited(s, "topk_logprobs", 2, 0, 0.5),
    "infinite log-prob": lambda s: edited(s, "topk_logprobs", 2, 3, -torch.inf),
    "not sorted": lambda s: edited(s, "topk_logprobs", 2, 3, -0.01),
    "repeats an id": lambda s: edited(s, "topk_ids", 2, 3, int(s.topk_ids[2, 0])),
    "mass above 1": lambda s: edited(
        replace(s, topk_logprobs=s.topk_logprobs.clone().index_fill(0, torch.tensor([2]), -0.1)),
        "logprobs",
        2,
        None,
        -0.1,
    ),
    "wanted id is not finite": lambda s: edited(s, "want_logprobs", 2, 1, -torch.inf),
    "wanted id is above 0": lambda s: edited(s, "want_logprobs", 2, 1, 0.5),
    "wanted ids have the shape": lambda s: replace(s, want_logprobs=s.want_logprobs[:, :2]),
    "4 log-probs for 5 completion tokens": lambda s: replace(s, logprobs=s.logprobs[:4]),
    "4 lists for 5 completion tokens": lambda s: replace(s, topk_ids=s.topk_ids[:4]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_an_answer_broken_in_one_place_is_refused(message):
    scores, tokens, want = true_answer()
    with pytest.raises(TeacherError) as caught:
        check_scores(BROKEN[message](scores), tokens, want, VOCAB)
    assert message in str(caught.value)
    if "for 5" not in message and "shape" not in message:
        assert "completion token 2:" in str(caught.value)


@pytest.mark.parametrize("name", ["sampled token", "wanted id"])
def test_numbers_that_contradict_the_list_are_refused(name):
    scores, tokens, want = true_answer()
    where = {"sampled token": ("logprobs", None), "wanted id": ("want_logprobs", 1)}[name]
    ids = tokens if name == "sampled token" else want[:, 1]
    listed = int((scores.topk_ids == ids[:, None]).any(1).nonzero()[0])
    unlisted = int((~(scores.topk_ids == ids[:, None]).any(1)).nonzero()[0])
    with pytest.raises(TeacherError, match=f"log-prob of the {name} is not the list's"):
        check_scores(edited(scores, where[0], listed, where[1], -9.0), tokens, want, VOCAB)
    better = float(scores.topk_logprobs[unlisted, -1]) + 0.01
    with pytest.raises(TeacherError, match=f"{name} is better than the list's last entry"):
        check_scores(edited(scores, where[0], unlisted, where[1], better), tokens, want, VOCAB)


def test_joined_answers_are_exact_only_if_all_are():
    scores, _, _ = true_answer()
    bare = replace(scores, want_logprobs=None)
    assert join([scores, scores]).exact and not join([scores, bare]).exact
    assert len(join([scores, bare]).logprobs) == 10


def test_local_teacher_scores_are_those_of_the_whole_softmax(micro_lab):
    """Oracle: log-softmax of the model's own logits, sequence by sequence without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32).eval()
    teacher = LocalTeacher(model, 40, batch_size=2)
    assert isinstance(teacher, Teacher)
    sequences, starts = [[5, 14, 6, 15, 8, 2], [1, 7, 9], [3, 4, 5, 6, 7, 8, 9]], [4, 1, 3]
    lengths = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
    want = torch.randint(0, 40, (sum(lengths), 3), generator=torch.Generator().manual_seed(1))
    scores = teacher.score(sequences, starts, want, 5)
    rows = []
    for ids, start in zip(sequences, starts, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0].detach()
        rows.append(logits[start - 1 : -1].log_softmax(-1))
    full, tokens = (
        torch.cat(rows),
        torch.tensor([t for s, n in zip(sequences, starts, strict=True) for t in s[n:]]),
    )
    close = {"rtol": 0.0, "atol": 2e-6}
    torch.testing.assert_close(scores.logprobs, full.gather(1, tokens[:, None])[:, 0], **close)
    torch.testing.assert_close(scores.want_logprobs, full.gather(1, want), **close)
    torch.testing.assert_close(scores.topk_logprobs, full.topk(5, dim=1).values, **close)
    check_scores(scores, tokens, want, 40)


def test_a_teacher_whose_rows_change_each_other_is_scored_row_by_row():
    """So does attention that reads only some keys, where several score the same. Oracle: rows alone."""
    model = make_model(seed=1).eval()
    model.model.layers[-1].register_forward_hook(
        lambda layer, read, out: out + out.amax(0, keepdim=True)
    )
    sequences, starts = [[5, 6, 7, 8, 9, 12, 13], [11, 14, 15, 16, 17, 18]], [5, 1]
    expected = [
        model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1).detach()
        for ids, start in zip(sequences, starts, strict=True)
    ]
    tokens = [torch.tensor(ids[start:]) for ids, start in zip(sequences, starts, strict=True)]
    own = [each.gather(1, ids[:, None])[:, 0] for each, ids in zip(expected, tokens, strict=True)]
    found = LocalTeacher(model, 40).score(sequences, starts, None, 4)
    torch.testing.assert_close(found.logprobs, torch.cat(own))
