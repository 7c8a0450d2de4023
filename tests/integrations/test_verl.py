"""The adapter for verl against verl's own classes, engine, loss and trainer, on the CPU: `make test-verl`."""

import math

import pytest

pytest.importorskip("verl", reason="make test-verl")

import torch
from transformers import AutoModelForCausalLM

from tests.integrations.verl_lab import (
    FORWARD,
    K1,
    PLAIN,
    gradients,
    make_worker,
    random_rows,
    scored,
    verl_config,
    verl_rows,
)

# isort: split
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

import taopd.integrations.verl as adapter
from taopd.errors import ConfigError, DataError, ShapeError
from taopd.integrations.verl.losses import weighted
from taopd.integrations.verl.selection import WEIGHTS, VerlSettings, choose_weights
from taopd.integrations.verl.trainer import read_settings
from taopd.selectors import select
from taopd.signals import signal_table, signals_from_logprobs, topk_lists_signals
from tests.conftest import is_documented
from tests.e2e.test_trainer import gradients_on_fixed_completions, make_trainer, relative_error

LISTS = VerlSettings(budget=0.3, score_top_k=4)
EXACT = VerlSettings(budget=0.3, score_top_k=4, signals="exact")


@pytest.fixture(scope="module")
def worker(micro_lab):
    return make_worker(verl_config(micro_lab))


@pytest.fixture(scope="module")
def rows(micro_lab):
    return random_rows(micro_lab)


def kept_positions(weights) -> list[tuple[int, int]]:
    return [tuple(place) for place in weights.to_padded_tensor(0).nonzero().tolist()]


def table_by_definition(micro_lab, rows, *, exact):
    """Signals of every response token from whole rows of both models' log-probs; no code of the adapter."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        for path in (micro_lab.student, micro_lab.teacher)
    ]
    both, response, position, targets = [], [], [], []
    for index, row in enumerate(rows):
        start, end = len(row["prompts"]) - 1, len(row["input_ids"]) - 1
        with torch.no_grad():
            logits = [model(input_ids=row["input_ids"][None]).logits[0] for model in models]
        both.append([values[start:end].log_softmax(-1) for values in logits])
        response += [index] * (end - start)
        position += range(end - start)
        targets.append(row["responses"])
    student, teacher = (torch.cat(parts) for parts in zip(*both, strict=True))
    if exact:
        signals = signals_from_logprobs(student, teacher, torch.cat(targets), k=4)
    else:
        own, other = student.topk(4), teacher.topk(4)
        signals = topk_lists_signals(own.indices, own.values, other.indices, other.values, k=4)
    return signal_table(
        signals,
        completion=torch.tensor(response),
        position=torch.tensor(position),
        valid=torch.ones(len(response), dtype=torch.bool),
    )


@pytest.mark.parametrize("selector", ["teachability", "tip", "q3", "random", "entropy"])
@pytest.mark.parametrize("signals", ["topk_lists", "exact"])
def test_selected_positions_equal_select_on_a_table_by_definition(
    micro_lab, worker, rows, signals, selector
):
    settings = VerlSettings(budget=0.3, score_top_k=4, signals=signals, selector=selector)
    exact = signals == "exact"
    weights, metrics = choose_weights(scored(worker, rows, exact=exact), settings, step=3)
    table = table_by_definition(micro_lab, rows, exact=exact)
    rules = "paper" if exact else "reference"
    truth = select(table, selector=selector, budget=0.3, step=3, rules=rules).kept
    expected = zip(table.completion[truth].tolist(), table.position[truth].tolist(), strict=True)
    assert kept_positions(weights) == list(expected)
    assert metrics["select/kept_tokens"] == int(truth.sum())
    assert all(is_documented(name) for name in metrics)


def our_run(micro_lab, tmp_path, **settings):
    """Loss, gradients and choice of our trainer on fixed completions, and verl's rows of the same tokens."""
    trainer = make_trainer(
        micro_lab, tmp_path, method="published", collapse_guard="off", **settings
    )
    seen = []
    trainer.observers.append(seen.append)
    loss, found = gradients_on_fixed_completions(trainer)
    batch = seen[0].batch
    prompts, completions = (
        [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)
        ]
        for part in ("prompt", "completion")
    )
    places = seen[0].positions
    kept = seen[0].choice.selection.kept
    chosen = sorted(zip(places.row[kept].tolist(), places.column[kept].tolist(), strict=True))
    teacher = trainer.teacher_model
    return loss, found, chosen, verl_rows(prompts, completions, teacher)


@pytest.mark.parametrize(
    ("loss", "mode"), [("forward_kl", FORWARD), ("sampled_reverse_kl", K1)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("signals", ["topk_lists", "exact"])
@pytest.mark.parametrize(
    ("reduction", "agg_mode"),
    [("token_mean", "token-mean"), ("sample_mean", "seq-mean-token-mean")],
)
def test_choice_loss_and_gradients_equal_those_of_our_trainer(
    micro_lab, tmp_path, worker, loss, mode, signals, reduction, agg_mode
):
    """verl's list is the whole vocabulary here, so its forward KL is the exact one.

    Two lists know the lower bound of C alone, which our trainer has under the name "bound".
    """
    ours, our_gradients, chosen, rows = our_run(
        micro_lab,
        tmp_path,
        loss=loss,
        signals=signals,
        compatibility="mass" if signals == "exact" else "bound",
        budget=0.3,
        reduction=reduction,
    )
    data = scored(worker, rows, exact=signals == "exact")
    settings = VerlSettings(budget=0.3, score_top_k=4, signals=signals)
    weights, _ = choose_weights(data, settings, step=0, agg_mode=agg_mode)
    assert kept_positions(weights) == chosen
    aggregation = f"actor_rollout_ref.actor.loss_agg_mode={agg_mode}"
    extra = {WEIGHTS: weights}
    if mode is K1:
        extra |= policy_gradient_columns(data)
    config = verl_config(micro_lab, *mode, aggregation)
    theirs, their_gradients = gradients(worker, config, rows, **extra)
    assert theirs == pytest.approx(ours, abs=1e-6)
    for name, gradient in our_gradients.items():
        assert relative_error(their_gradients[name], gradient) < 1e-5, name


def policy_gradient_columns(data) -> dict[str, torch.Tensor]:
    """What verl's trainer has written by then; advantages are read even where they do not count."""
    old = response_from_nested(data["log_probs"], data["response_mask"])
    return {"old_log_probs": old, "advantages": torch.zeros_like(old)}


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_budget_one_equals_verls_plain_distillation(micro_lab, worker, rows, agg_mode):
    everything = VerlSettings(budget=1.0, score_top_k=4)
    weights, _ = choose_weights(scored(worker, rows), everything, step=0, agg_mode=agg_mode)
    assert bool((weights.values() == 1).all())
    aggregation = f"actor_rollout_ref.actor.loss_agg_mode={agg_mode}"
    plain = gradients(worker, verl_config(micro_lab, *PLAIN, aggregation), rows)
    config = verl_config(micro_lab, *FORWARD, aggregation)
    ours = gradients(worker, config, rows, **{WEIGHTS: weights})
    assert ours[0] == plain[0]
    assert all(torch.equal(ours[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_neither_choice_nor_gradient(micro_lab, worker, rows, micro):
    """At 4 % one or two tokens are kept, so most micro-batches of one response hold none."""
    settings = VerlSettings(budget=0.04, score_top_k=4)
    config = verl_config(micro_lab)
    whole, _ = choose_weights(scored(worker, rows, micro=8), settings, step=0)
    weights, metrics = choose_weights(scored(worker, rows, micro=micro), settings, step=0)
    assert kept_positions(weights) == kept_positions(whole)
    assert metrics["select/empty_completions"] > 0.5
    truth = gradients(worker, config, rows, micro=8, **{WEIGHTS: whole})
    found = gradients(worker, config, rows, micro=micro, **{WEIGHTS: weights})
    assert found[0] == pytest.approx(truth[0], abs=1e-6)
    for name in truth[1]:
        assert relative_error(found[1][name], truth[1][name]) < 1e-5, name


def test_packed_batches_equal_padded_ones(micro_lab, worker, rows):
    """verl's `use_remove_padding` and `use_dynamic_bsz`: a number of tokens as one sequence, reordered."""
    settings, config = VerlSettings(budget=0.3, score_top_k=4), verl_config(micro_lab)
    expected, _ = choose_weights(scored(worker, rows), settings, step=0)
    weights, _ = choose_weights(scored(worker, rows, packed=True), settings, step=0)
    assert kept_positions(weights) == kept_positions(expected)
    truth = gradients(worker, config, rows, **{WEIGHTS: expected})
    found = gradients(worker, config, rows, packed=True, **{WEIGHTS: weights})
    assert found[0] == pytest.approx(truth[0], abs=1e-6)
    for name in truth[1]:
        assert relative_error(found[1][name], truth[1][name]) < 1e-5, name


def test_shards_scored_apart_give_the_choice_of_the_whole(worker, rows):
    whole = scored(worker, rows)
    shards = [scored(worker, part) for part in (rows[:2], rows[2:])]
    joined = tu.concat_tensordict(shards)
    expected, _ = choose_weights(whole, LISTS, step=0)
    found, _ = choose_weights(joined, LISTS, step=0)
    assert kept_positions(found) == kept_positions(expected)
    alone = [kept_positions(choose_weights(shard, LISTS, step=0)[0]) for shard in shards]
    apart = alone[0] + [(row + 2, column) for row, column in alone[1]]
    assert apart != kept_positions(expected), "vacuous"


def test_verls_padding_and_masked_tokens_are_no_rows_of_the_choice(micro_lab, worker, rows):
    expected, _ = choose_weights(scored(worker, rows), LISTS, step=0)
    padding, _ = construct_minimal_padding_template(dict(rows[0]), {}, eos_token_id=2)
    padded = [*rows, {name: padding[name] for name in rows[0]}]
    weights, metrics = choose_weights(scored(worker, padded, micro=3), LISTS, step=0)
    assert kept_positions(weights) == kept_positions(expected)
    assert metrics["select/valid_tokens"] == sum(len(row["responses"]) for row in rows)
    tool = [
        row | {name: row[name].clone() for name in ("response_mask", "loss_mask")} for row in rows
    ]
    first = kept_positions(expected)[0]
    tool[first[0]]["response_mask"][first[1]] = 0
    without, _ = choose_weights(scored(worker, tool), LISTS, step=0)
    assert first not in kept_positions(without)
    assert kept_positions(without)


def test_empty_responses_and_batches_without_a_token_are_data(worker, rows):
    data = scored(worker, rows)
    cut = data.clone()
    lengths = [0 if row in (1, 4) else len(each["responses"]) for row, each in enumerate(rows)]
    for name in ("response_mask", "loss_mask"):
        masks = [torch.ones(length, dtype=torch.int64) for length in lengths]
        cut[name] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    weights, metrics = choose_weights(cut, LISTS, step=0)
    assert {row for row, _ in kept_positions(weights)}.isdisjoint({1, 4})
    assert metrics["select/valid_tokens"] == sum(lengths)
    nothing = data.clone()
    nothing["response_mask"] = torch.zeros_like(data["response_mask"])
    weights, metrics = choose_weights(nothing, LISTS, step=0)
    assert kept_positions(weights) == []
    assert metrics["select/kept_tokens"] == 0


def test_tokens_off_the_teachers_list_never_train_by_k1(micro_lab, worker):
    rows = random_rows(micro_lab, topk=4)
    listed = {
        (index, column)
        for index, row in enumerate(rows)
        for column, token in enumerate(row["responses"].tolist())
        if token in row["teacher_ids"][len(row["prompts"]) - 1 + column].tolist()
    }
    everything = VerlSettings(budget=1.0, score_top_k=4)
    data = scored(worker, rows)
    weights, metrics = choose_weights(data, everything, step=0, on_teacher_list=True)
    assert set(kept_positions(weights)) == listed
    num_tokens = sum(len(row["responses"]) for row in rows)
    assert metrics["select/off_teacher_list"] == pytest.approx(1 - len(listed) / num_tokens)
    columns = {WEIGHTS: weights} | policy_gradient_columns(data)
    loss, found = gradients(worker, verl_config(micro_lab, *K1), rows, **columns)
    assert math.isfinite(loss)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_exact_signals_need_a_list_that_holds_the_students_ids(micro_lab, worker):
    data = scored(worker, random_rows(micro_lab, topk=8), exact=True)
    with pytest.raises(DataError, match=r"topk, lower score_top_k, or set signals='topk_lists'"):
        choose_weights(data, EXACT, step=0)


def test_weighted_selectors_reach_the_loss(worker, rows):
    settings = VerlSettings(budget=0.5, score_top_k=4, selector="pw")
    weights, _ = choose_weights(scored(worker, rows), settings, step=0)
    kept = weights.values()[weights.values() != 0]
    assert kept.unique().numel() > 1
    num_tokens = sum(len(row["responses"]) for row in rows)
    assert float(weights.values().sum()) == pytest.approx(num_tokens, rel=1e-6)


BAD_SETTINGS = [
    (["+trainer.v1.taopd_sync.selector=teachabilty"], "Did you mean 'teachability'"),
    (["+trainer.v1.taopd_sync.budgets=0.1"], "Did you mean 'budget'"),
    (["+trainer.v1.taopd_sync.selector=pgt"], "reads the signal 'log_ratio_variance'"),
    (["trainer.v1.taopd_sync.score_top_k=50"], "verl's teacher sends 40 ids"),
    (["trainer.v1.taopd_sync.score_top_k=many"], "score_top_k='many': must be a whole number"),
    (["+trainer.v1.taopd_sync.seed=1.5"], "seed=1.5: must be a whole number"),
    (["+trainer.v1.taopd_sync.budget=5"], r"budget=5: must be in \(0, 1\]"),
    (["+trainer.v1.taopd_sync.budget=0"], r"budget=0: must be in \(0, 1\]"),
    (["+trainer.v1.taopd_sync.min_keep=-1"], "min_keep=-1: must be a whole number"),
    (["+trainer.v1.taopd_sync.normalization=quantil"], "normalization='quantil' is unknown"),
    (["+trainer.v1.taopd_sync.signals=lists"], "must be 'topk_lists' or 'exact'"),
    (["+trainer.v1.taopd_sync.compatibility=bound"], "compatibility='bound' is unknown"),
    (["+trainer.v1.taopd_sync.compatibility=reach"], "compatibility='reach' is unknown"),
    (["distillation.enabled=false"], "needs distillation.enabled=true"),
    (PLAIN, "taopd_forward_kl_topk or taopd_k1"),
    (["actor_rollout_ref.actor.strategy=megatron"], "strategy=fsdp or fsdp2"),
    (
        ["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"],
        "ulysses_sequence_parallel_size=1",
    ),
    (["actor_rollout_ref.model.use_fused_kernels=true"], "use_fused_kernels=false"),
    (["algorithm.rollout_correction.bypass_mode=true"], "bypass_mode=false"),
    (["actor_rollout_ref.actor.loss_agg_mode=token-sum"], "token-mean or seq-mean-token-mean"),
    (["distillation.distillation_loss.loss_max_clamp=10"], "loss_max_clamp=null"),
    (K1[:1], "use_policy_gradient=true"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:60])
def test_settings_that_do_not_fit_are_refused_by_name(micro_lab, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(verl_config(micro_lab, *overrides))


def test_a_batch_without_our_columns_is_refused(worker, rows):
    data = scored(worker, rows)
    missing = data.exclude("taopd_disagreement")
    with pytest.raises(DataError, match=r"no taopd_disagreement.*bypass_mode=false"):
        choose_weights(missing, LISTS, step=0)
    with pytest.raises(DataError, match="trainer_mode=taopd_sync"):
        weighted(torch.ones(8, 6), data)
    data[WEIGHTS] = torch.ones(8, 5)
    with pytest.raises(ShapeError, match=r"expected \[8, 6\], got \[8, 5\]"):
        weighted(torch.ones(8, 6), data)
    bare = [{name: row[name] for name in row if not name.startswith("teacher")} for row in rows]
    with pytest.raises(DataError, match=r"distillation\.enabled=true"):
        scored(worker, bare)


def test_verls_registries_know_the_trainer_and_the_losses(micro_lab):
    assert get_trainer_cls("taopd_sync") is adapter.SelectiveTrainer
    trainer = adapter.SelectiveTrainer.__new__(adapter.SelectiveTrainer)
    trainer.config = verl_config(micro_lab)
    trainer._init_resource_pool_mgr()
    workers = {
        str(role): cls.__ray_actor_class__ for role, cls in trainer.role_worker_mapping.items()
    }
    assert workers["actor_rollout"] is adapter.SelectiveWorker
    assert len([cls for cls in workers.values() if cls is adapter.SelectiveWorker]) == 1
    assert set(adapter.LOSS_MODES) <= set(DISTILLATION_LOSS_REGISTRY)


def test_another_version_of_verl_is_refused(monkeypatch):
    monkeypatch.setattr(adapter, "installed_version", lambda name: "0.10.0")
    with pytest.raises(ConfigError, match=r"written for verl 0\.9\.1 and found 0\.10\.0"):
        adapter.check_version()
