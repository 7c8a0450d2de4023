"""The one-step protocol.

Oracles: autograd and torch's optimizers on the whole sequences, without the library's selection or loss.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from taopd.diagnose.bank import Rollouts, sample_rollouts
from taopd.diagnose.one_step import (
    OneStepSettings,
    freeze_batch,
    moved,
    norm_of,
    selection_gradient,
    trainable,
    update_of,
)
from taopd.diagnose.one_step_table import (
    one_step,
    one_step_batches,
    spearman,
    split_batches,
    summarize_one_step,
)
from taopd.errors import ConfigError, DataError
from tests.conftest import WORDS, make_model, make_rows, make_tokenizer

VOCAB = len(WORDS)
SETTINGS = OneStepSettings(
    selectors=("full", "random", "teachability"),
    budget=0.2,
    score_top_k=4,
    learning_rate=1e-3,
    batch_size=3,
)


@pytest.fixture(scope="module")
def lab():
    student, teacher = make_model(seed=0), make_model(seed=1, hidden_size=32)
    prompts = list(dict.fromkeys(row["prompt"] for row in make_rows(40, "train")))
    rollouts = sample_rollouts(student, make_tokenizer(), prompts, num_completions=16, max_tokens=6)
    return student, teacher.requires_grad_(False), list(split_batches(rollouts, 4))


def whole_sequence_kl(student, teacher, rollouts: Rollouts, direction: str) -> torch.Tensor:
    """KL of every completion token, one rollout at a time."""
    parts = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        s, t = (
            model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (student, teacher)
        )
        p, q = (s, t) if direction == "reverse" else (t, s)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_the_gradient_is_autograds(lab, loss):
    student, teacher, batches = lab
    settings = OneStepSettings(score_top_k=4, batch_size=3, loss=loss)
    frozen = freeze_batch(student, teacher, batches[0][0], settings, VOCAB)
    weights = torch.rand(len(frozen.positions), generator=torch.Generator().manual_seed(0))
    weights[weights < 0.7] = 0.0
    ours = selection_gradient(student, frozen, weights, settings, VOCAB)
    values = whole_sequence_kl(student, teacher, batches[0][0], loss.removesuffix("_kl"))
    theirs = torch.autograd.grad((weights * values).sum(), trainable(student))
    assert norm_of(ours) > 1e-3, "vacuous"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_one_step_is_the_step_of_torchs_optimizer(lab):
    """Full distillation, AdamW, raw: gains on both batches from a model stepped by hand."""
    student, teacher, batches = lab
    rows = one_step(student, teacher, *batches[0], SETTINGS, vocab_size=VOCAB)
    row = rows.query("selector == 'full' and optimizer == 'adamw' and variant == 'raw'").iloc[0]
    copy = make_model(seed=0)
    before = [whole_sequence_kl(copy, teacher, part, "reverse").detach() for part in batches[0]]
    whole_sequence_kl(copy, teacher, batches[0][0], "reverse").mean().backward()
    torch.optim.AdamW(copy.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0).step()
    after = [whole_sequence_kl(copy, teacher, part, "reverse").detach() for part in batches[0]]
    own, fresh = (float((a - b).mean()) for a, b in zip(before, after, strict=True))
    assert own > 1e-4, "vacuous"
    assert row["gain_reverse_selected"] == pytest.approx(own, rel=1e-3, abs=1e-6)
    assert row["gain_reverse_fresh"] == pytest.approx(fresh, rel=1e-3, abs=1e-6)
    assert math.isnan(row["gain_reverse_others"]) and math.isnan(row["spearman_reverse_fresh"])


def test_budget_norms_and_counts(lab):
    student, teacher, batches = lab
    before = [parameter.detach().clone() for parameter in student.parameters()]
    rows = one_step(student, teacher, *batches[0], SETTINGS, vocab_size=VOCAB)
    for parameter, old in zip(student.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None
    assert len(rows) == 3 * 2 * 2
    num_tokens = sum(map(len, batches[0][0].completion_ids))
    selected = rows.groupby("selector")["num_selected"].unique().to_dict()
    assert selected["full"] == [num_tokens]
    assert selected["random"] == selected["teachability"] == [math.ceil(0.2 * num_tokens)]
    common = 1e-3 * math.sqrt(sum(p.numel() for p in student.parameters()))
    equal = rows[rows["variant"] == "equal_norm"]
    np.testing.assert_allclose(equal["update_norm"], common, rtol=1e-5)
    raw = rows[rows["variant"] == "raw"].groupby("optimizer")["learning_rate"].nunique()
    assert raw.to_dict() == {"adamw": 1, "sgd": 1}
    full = rows.query("selector == 'full' and optimizer == 'sgd' and variant == 'raw'").iloc[0]
    assert full["update_norm"] == pytest.approx(common, rel=1e-5)
    assert (rows["num_excluded"] == 0).all()


def test_gains_of_selected_and_others_add_up(lab):
    """Weighted by their counts they are the gain of the whole batch."""
    student, teacher, batches = lab
    rows = one_step(student, teacher, *batches[0], SETTINGS, vocab_size=VOCAB)
    row = rows.query("selector == 'random' and optimizer == 'sgd' and variant == 'raw'").iloc[0]
    frozen = freeze_batch(student, teacher, batches[0][0], SETTINGS, VOCAB)
    from taopd.losses import reduction_weights
    from taopd.selectors import select

    selection = select(frozen.table, selector="random", budget=0.2, seed=0, step=0)
    weights = reduction_weights(selection.weights, frozen.table.completion, frozen.table.valid)
    gradient = selection_gradient(student, frozen, weights, SETTINGS, VOCAB)
    update = update_of(trainable(student), gradient, "sgd", row["learning_rate"], SETTINGS)
    with torch.no_grad():
        before = whole_sequence_kl(student, teacher, batches[0][0], "forward")
        with moved(trainable(student), update, 1.0):
            after = whole_sequence_kl(student, teacher, batches[0][0], "forward")
    kept, total = row["num_selected"], row["num_tokens"]
    pooled = row["gain_forward_selected"] * kept + row["gain_forward_others"] * (total - kept)
    assert pooled / total == pytest.approx(float((before - after).mean()), abs=1e-6)
    assert row["gain_forward_selected"] == pytest.approx(
        float((before - after)[selection.kept].mean()), abs=2e-6
    )


def test_same_input_gives_the_same_rows_and_batches_differ(lab):
    student, teacher, batches = lab
    calls: list[tuple[int, int]] = []
    first = one_step_batches(
        student,
        teacher,
        batches,
        SETTINGS,
        vocab_size=VOCAB,
        progress=lambda done, total: calls.append((done, total)),
    )
    again = one_step_batches(student, teacher, batches, SETTINGS, vocab_size=VOCAB)
    pd.testing.assert_frame_equal(first, again)
    assert calls[-1] == (24, 24) and first["batch"].unique().tolist() == [0, 1]
    summary = summarize_one_step(first).set_index(["selector", "optimizer", "variant", "measure"])
    where = ("teachability", "adamw", "raw")
    values = first.query(
        "selector == 'teachability' and optimizer == 'adamw' and variant == 'raw'"
    )["gain_reverse_fresh"].to_numpy()
    row = summary.loc[(*where, "gain_reverse_fresh")]
    assert row["mean"] == pytest.approx(values.mean()) and row["num_batches"] == 2
    assert row["low"] == pytest.approx(np.quantile(values, 0.025))
    random = first.query("selector == 'random' and optimizer == 'adamw' and variant == 'raw'")
    paired = values - random["gain_reverse_fresh"].to_numpy()
    row = summary.loc[(*where, "gain_reverse_fresh_over_random")]
    assert row["mean"] == pytest.approx(paired.mean())


def test_spearman_is_the_correlation_of_ranks_with_ties_averaged():
    scores, gains = np.array([1.0, 1.0, 3.0, 4.0]), np.array([0.0, 2.0, 1.0, 5.0])
    ranks = np.array([1.5, 1.5, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert spearman(scores, gains) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert math.isnan(spearman(np.ones(1), np.ones(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"selectors": ("teachabilty",)}, "Did you mean 'teachability'"),
        ({"selectors": ()}, "no selectors"),
        ({"loss": "kl"}, "loss='kl' is unknown"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        OneStepSettings(**settings)


def test_bad_input(lab):
    student, teacher, batches = lab
    with pytest.raises(DataError, match="no batches"):
        one_step_batches(student, teacher, [], SETTINGS, vocab_size=VOCAB)
    half = make_model(seed=0).bfloat16()
    with pytest.raises(ConfigError, match="rounds a small step away"):
        one_step(half, teacher, *batches[0], SETTINGS, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        trainable(teacher)
    with pytest.raises(DataError, match="student and teacher agree"):
        one_step(student, student, *batches[0], SETTINGS, vocab_size=VOCAB)
    twice = Rollouts(prompt_ids=[[5], [6], [5], [7]], completion_ids=[[8]] * 4)
    with pytest.raises(DataError, match="in both the frozen and the fresh"):
        list(split_batches(twice, 2))
