"""Selectors beyond the paper in the trainer: they train, cost nothing when unused, and do what they say."""

import json

import pytest
import torch
from test_trainer import (
    gradients_on_fixed_completions,
    make_trainer,
    relative_error,
    train_once,
    weights_of,
)

from taopd.errors import ConfigError
from taopd.losses import merge_columns, reverse_kl
from taopd.selectors import SELECTORS
from tests.conftest import WORDS, is_documented


def last_metrics(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "loss/selected_nats" in line]


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": "rank_or(tip, ier)", "shadow_selectors": ["random", "pgt*entropy", "iw"]},
        {"selector": "reverse_kl", "weighting": "score"},
        {"selector": "opsa", "loss": "fixed_advantage", "budget": 0.2},
        {"selector": "dial", "draw": "proportional", "loss": "sampled_reverse_kl"},
        {"selector": "compatible", "budget_scope": "response", "loss": "routed_kl"},
        {"budget_schedule": "cosine", "budget_end": 0.5},
        {"stop_tokens": "exclude", "selector": "selectkd"},
        {"stop_tokens": "merge", "stop_token_ids": [2, 5], "selector": "bellman(gamma=0.9)"},
        {
            "stop_tokens": "merge",
            "stop_token_ids": [2, 5],
            "loss": "sampled_reverse_kl",
            "num_iterations": 2,
        },
        {"signals": "topk_lists", "selector": "corrective", "weighting": "rank"},
    ],
    ids=str,
)
def test_every_setting_trains_and_logs_documented_metrics(micro_lab, tmp_path, settings):
    before = weights_of(make_trainer(micro_lab, tmp_path))
    trainer, *_ = train_once(micro_lab, tmp_path, max_steps=2, **settings)
    changed = weights_of(trainer)
    assert any(not torch.equal(before[name], changed[name]) for name in before)
    entries = last_metrics(tmp_path)
    assert len(entries) == 2
    for name in entries[-1]:
        if name.startswith(("select/", "shadow/", "signal/", "update/")):
            assert is_documented(name), name
    if "shadow_selectors" in settings:
        assert 0 <= entries[-1]["shadow/jaccard/pgt*entropy"] <= 1
        assert "shadow/jaccard_between/random & iw" in entries[-1]
    if "budget_schedule" in settings:
        assert [entry["select/nominal_fraction"] for entry in entries] == [0.1, 0.5]


def test_entropy_is_the_same_number_whatever_the_signals_are(micro_lab, tmp_path):
    """Of the full vocabulary, in nats: lists have another one, which selectors read."""
    found = {}
    for signals in ("exact", "topk_lists"):
        folder = tmp_path / signals
        train_once(micro_lab, folder, max_steps=1, signals=signals)
        found[signals] = last_metrics(folder)[0]
    exact, lists = found["exact"], found["topk_lists"]
    assert lists["entropy"] == pytest.approx(exact["entropy"], rel=1e-6)
    assert lists["signal/entropy_nats/mean"] < 1 < exact["signal/entropy_nats/mean"], "vacuous"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"score_top_k": 41}, "score_top_k=41: larger than the vocabulary of 40 ids"),
        ({"score_top_k": 40, "stop_token_ids": [2, 5]}, "with 2 merged ids: larger than .* 40 ids"),
        ({"stop_token_ids": [2, 40]}, "stop id 40 is outside .* 40 ids: set stop_token_ids"),
    ],
    ids=["k", "k and merged", "outside"],
)
def test_what_no_batch_could_be_scored_with_is_refused_before_the_first(
    micro_lab, tmp_path, settings, says
):
    merge = {"stop_tokens": "merge"} if "stop_token_ids" in settings else {}
    with pytest.raises(ConfigError, match=says):
        make_trainer(micro_lab, tmp_path, **merge, **settings)


@pytest.mark.parametrize("method", ["anchored", "reach"])
def test_shadows_leave_the_run_bit_for_bit_alone(micro_lab, tmp_path, method):
    """All selectors: some of them need the initial student at every token, and the run does not."""
    settings = {"max_steps": 3, "budget": 0.2, "method": method, "learning_rate": 0.1}
    # Completions of several lengths, and a hold that is felt: it is there that a sum may round otherwise.
    settings |= {"temperature": 0.5, "max_completion_length": 20, "anchor_coef": 10.0}
    plain = weights_of(train_once(micro_lab, tmp_path, **settings)[0])
    watched = weights_of(
        train_once(micro_lab, tmp_path, **settings, shadow_selectors=sorted(SELECTORS))[0]
    )
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("learning_rate", [1e-4, 3e-3])
def test_every_update_has_the_norm_that_was_asked_for(micro_lab, tmp_path, learning_rate):
    trainer = make_trainer(
        micro_lab,
        tmp_path,
        max_steps=1,
        match_update_norm=0.05,
        log_update_norm=False,
        learning_rate=learning_rate,
    )
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    total = sum(float((after[name] - before[name]).double().pow(2).sum()) for name in before)
    assert total**0.5 == pytest.approx(0.05, rel=1e-3)
    entry = last_metrics(tmp_path)[-1]
    assert entry["update/norm"] * entry["update/scale"] == pytest.approx(0.05, rel=1e-4)


def test_rescaling_keeps_the_direction(micro_lab, tmp_path):
    moves = []
    for settings in ({}, {"match_update_norm": 0.5}):
        trainer = make_trainer(micro_lab, tmp_path, max_steps=1, learning_rate=1e-3, **settings)
        before = weights_of(trainer)
        trainer.train()
        after = weights_of(trainer)
        moves.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    assert torch.cosine_similarity(*moves, dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_excluded_stop_tokens_never_train(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, selector="full", stop_tokens="exclude")
    seen = []
    trainer.observers.append(seen.append)
    gradients_on_fixed_completions(trainer)
    (scored,) = seen
    stopped = scored.token_ids == 2
    assert stopped.any() and (scored.choice.loss_weights[stopped] == 0).all()
    assert (scored.choice.loss_weights[~stopped] > 0).all()


def test_merged_stop_tokens_give_the_gradient_of_the_merged_distributions(micro_lab, tmp_path):
    merged = (2, 5, 9)
    trainer = make_trainer(
        micro_lab, tmp_path, selector="full", stop_tokens="merge", stop_token_ids=list(merged)
    )
    seen = []
    trainer.observers.append(seen.append)
    loss, gradients = gradients_on_fixed_completions(trainer)
    (scored,) = seen
    ids = torch.cat([scored.batch["prompt_ids"], scored.batch["completion_ids"]], dim=1)
    mask = torch.cat([scored.batch["prompt_mask"], scored.batch["completion_mask"]], dim=1)
    completion = scored.batch["completion_mask"].bool()
    start = scored.batch["prompt_ids"].shape[1] - 1
    trainer.model.zero_grad()
    rows = []
    for model in (trainer.model, trainer.teacher_model):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, start:-1][completion]
        rows.append(merge_columns(logits.float().log_softmax(-1), merged))
    assert rows[0].shape[1] == len(WORDS) - 2
    truth = reverse_kl(*rows).mean()
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[name], parameter.grad) < 1e-4, name
