"""Gains of checkpoints, their files, and the callback.

Oracles: whole-sequence logits in float64 before and after; a training run without the callback.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from taopd.diagnose.bank import FixedContextBank, sample_rollouts
from taopd.diagnose.callback import BankCallback
from taopd.diagnose.collect import RolloutCollector
from taopd.diagnose.gain import (
    learnable_groups,
    load_checkpoint,
    measure_gains,
    model_gain,
    summarize,
    teacher_states,
)
from taopd.diagnose.gain_files import read_gains, write_gains
from taopd.errors import ConfigError, DataError
from taopd.models.loading import load_model
from taopd.models.prompts import load_prompts
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, is_documented, make_model, make_rows, make_tokenizer

PROMPTS = [row["prompt"] for row in make_rows(6, "train")]


@pytest.fixture(scope="module")
def bank(micro_lab, tmp_path_factory) -> FixedContextBank:
    student, tokenizer = load_model(micro_lab.student, dtype="float32"), make_tokenizer()
    rollouts = sample_rollouts(student, tokenizer, PROMPTS, num_completions=8, max_tokens=6)
    folder = tmp_path_factory.mktemp("gain") / "bank"
    teacher = load_model(micro_lab.teacher, dtype="float32")
    return FixedContextBank.freeze(student, teacher, tokenizer, rollouts, folder, k=(2, 4))


@pytest.fixture
def teacher(micro_lab):
    return load_model(micro_lab.teacher, dtype="float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint with other weights, named as a trainer names it."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint-7"
    make_model(seed=5).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def whole_sequence_kl(bank, student, teacher) -> np.ndarray:
    """[N, 2] forward and reverse KL, one rollout at a time, in float64."""
    rows = []
    for prompt, completion in zip(
        bank.rollouts.prompt_ids, bank.rollouts.completion_ids, strict=True
    ):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            p, q = (
                model.double().eval()(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
                for model in (student, teacher)
            )
        rows += torch.stack(
            [(q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)], dim=1
        ).tolist()
    return np.array(rows)


def test_gains_equal_whole_sequence_divergences_in_float64(bank, micro_lab, trained, teacher):
    (gain,) = measure_gains(bank, [trained], teacher)
    before, after = (
        whole_sequence_kl(bank, load_model(path), load_model(micro_lab.teacher))
        for path in (micro_lab.student, trained)
    )
    truth = before - after
    assert np.abs(truth).mean() > 1e-3, "vacuous"
    for column, name in enumerate(("forward", "reverse")):
        np.testing.assert_allclose(gain.tokens[f"gain_{name}"], truth[:, column], atol=2e-6)
        share = truth[:, column] / (before[:, column] + 1e-12)
        np.testing.assert_allclose(gain.tokens[f"gain_{name}_share"], share, rtol=2e-3, atol=1e-4)
    assert (gain.label, gain.step, gain.num_excluded) == ("checkpoint-7", 7, 0)


def test_the_student_itself_gains_nothing_and_the_teacher_everything(bank, micro_lab, teacher):
    same, all_of_it = measure_gains(bank, [micro_lab.student, micro_lab.teacher], teacher)
    assert same.tokens[["gain_forward", "gain_reverse"]].abs().to_numpy().max() < 1e-6
    np.testing.assert_allclose(all_of_it.tokens["gain_forward_share"], 1.0, atol=1e-3)
    np.testing.assert_allclose(all_of_it.tokens["forward_kl_after"], 0.0, atol=1e-6)
    assert all_of_it.summary()["gain_reverse_share/mean"] == pytest.approx(1.0, abs=1e-4)


def test_a_share_of_a_tiny_divergence_is_no_rounding(tmp_path):
    """Of models that agree and are sure of nearly every token: no KL below 0, no gain above all of it."""

    def moved(share):
        model = make_model(seed=1)
        with torch.no_grad():
            head = model.lm_head.weight
            noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(2))
            head.mul_(300.0).add_(noise, alpha=0.01 * share)
        return model

    rollouts = sample_rollouts(
        moved(0), make_tokenizer(), PROMPTS, num_completions=16, max_tokens=8
    )
    models = moved(1), moved(0), make_tokenizer()
    bank = FixedContextBank.freeze(*models, rollouts, tmp_path / "bank", k=(2,))
    found = model_gain(bank, moved(0.5), list(teacher_states(bank, models[1])), label="x").tokens
    for direction in ("forward", "reverse"):
        kl, share = found[f"{direction}_kl"], found[f"gain_{direction}_share"]
        assert 0 < (kl < 1e-7).mean() < 1 and kl.max() > 1e-6, "vacuous"
        assert kl.min() > -1e-12 and found[f"{direction}_kl_after"].min() > -1e-12
        assert share[kl > 1e-9].between(0.5, 1).all()


def test_an_adapter_folder_is_measured_as_the_merged_model(bank, micro_lab, teacher, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_model(micro_lab.student, dtype="float32"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    in_memory = model_gain(bank, adapted, list(teacher_states(bank, teacher)), label="x")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    adapter, whole = measure_gains(bank, [tmp_path / "adapter", tmp_path / "merged"], teacher)
    assert adapter.tokens["gain_forward"].abs().mean() > 1e-4, "vacuous"
    for other in (whole, in_memory):
        np.testing.assert_allclose(
            adapter.tokens["gain_forward"], other.tokens["gain_forward"], atol=2e-6
        )


def test_gains_that_are_not_finite_are_counted_named_and_in_no_mean(
    bank, micro_lab, teacher, tmp_path, caplog
):
    """One token's embedding is NaN: so is every position of a rollout that holds it (0 * NaN is NaN)."""
    student = load_model(micro_lab.student, dtype="float32")
    victim = bank.rollouts.completion_ids[3][2]
    with torch.no_grad():
        student.get_input_embeddings().weight[victim] = torch.nan
    student.save_pretrained(tmp_path / "broken")
    expected = [
        victim in prompt + completion
        for prompt, completion in zip(
            bank.rollouts.prompt_ids, bank.rollouts.completion_ids, strict=True
        )
        for _ in completion
    ]
    assert 0 < sum(expected) < len(expected)
    with caplog.at_level(logging.WARNING, "taopd"):
        (gain,) = measure_gains(bank, [tmp_path / "broken"], teacher)
    assert gain.tokens["gain_forward"].isna().tolist() == expected
    assert gain.num_excluded == sum(expected) == len(gain.tokens) - len(gain.measured)
    first = bank.locate(expected.index(True))
    assert f"broken: {sum(expected)} of {len(expected)} gains" in caplog.text
    assert f"excluded, the first at {first}" in caplog.text
    assert np.isfinite(gain.summary()["gain_forward_nats/mean"])


def test_another_vocabulary_or_teacher_is_refused(bank, micro_lab, teacher, trained, tmp_path):
    make_model(seed=0, vocab_size=len(WORDS) + 3).save_pretrained(tmp_path / "larger")
    with pytest.raises(DataError, match=r"larger has another vocabulary: its head has 43 rows"):
        load_checkpoint(bank, tmp_path / "larger")
    renamed = Path(shutil.copytree(trained, tmp_path / "renamed"))
    make_tokenizer((*WORDS[:-1], "other")).save_pretrained(renamed)
    with pytest.raises(DataError, match=r"renamed has another vocabulary: this tokenizer"):
        load_checkpoint(bank, renamed)
    with pytest.raises(DataError, match="this teacher is not the one"):
        measure_gains(bank, [trained], load_model(trained))
    with pytest.raises(DataError, match="no checkpoint"):
        measure_gains(bank, [], teacher)
    with pytest.raises(DataError, match="is a file"):
        measure_gains(bank, [micro_lab.prompts], teacher)


def test_groups_and_pooled_shares_by_hand(bank, trained, teacher):
    (gain,) = measure_gains(bank, [trained], teacher)
    tokens = gain.measured
    groups = learnable_groups(tokens, k=4)
    high = tokens["quadrant_k4"].isin([1, 3])
    assert (groups["learnable"] == (high & (tokens["compatibility_k4"] > 0.5))).all()
    assert ((groups["learnable"] | groups["incompatible"]) == high).all()
    values = summarize(tokens, k=4)
    assert values["gain_forward_nats/mean"] == pytest.approx(tokens["gain_forward"].mean())
    pooled = tokens["gain_forward"].sum() / tokens["forward_kl"].sum()
    assert values["gain_forward_share/mean"] == pytest.approx(pooled)
    with pytest.raises(DataError, match="k=16: the bank has 2, 4"):
        learnable_groups(tokens, k=16)


def test_files_round_trip_and_refuse_edits(bank, micro_lab, trained, teacher, tmp_path):
    gains = measure_gains(bank, [micro_lab.student, trained], teacher)
    folder = write_gains(gains, bank, tmp_path / "a")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    for ours, theirs in zip(gains, read_gains(moved), strict=True):
        assert (ours.label, ours.step) == (theirs.label, theirs.step)
        assert ours.tokens.equals(theirs.tokens)
    again = write_gains(gains, bank, tmp_path / "b")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    with pytest.raises(DataError, match="already holds a gain"):
        write_gains(gains, bank, folder)
    path = moved / "gain-001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"gain-001.parquet was truncated"):
        read_gains(moved)


def make_trainer(micro_lab, folder: Path, **settings):
    args = TeachabilityConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        max_completion_length=4,
        score_top_k=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        budget=0.5,
        **{"max_steps": 4} | settings,
    )
    return TeachabilityTrainer(
        model=str(micro_lab.student),
        teacher_model=str(micro_lab.teacher),
        args=args,
        train_dataset=load_prompts(micro_lab.prompts),
        processing_class=make_tokenizer(),
    )


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_the_callback_logs_gains_and_disturbs_nothing(bank, micro_lab, tmp_path):
    plain = make_trainer(micro_lab, tmp_path / "plain")
    plain.train()
    watched = make_trainer(micro_lab, tmp_path / "watched")
    callback = BankCallback.attach(watched, bank, every=2)
    watched.train()
    for ours, theirs in zip(weights(watched), weights(plain), strict=True):
        assert torch.equal(ours, theirs)
    lines = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").open()]
    logged = {line["step"]: line for line in lines if "bank/gain_forward_nats/mean" in line}
    assert list(logged) == [2, 4] and [step for step, _ in callback.curve] == [0, 2, 4]
    assert all(is_documented(key) for key in logged[4] if key.startswith(("bank/", "perf/bank")))
    assert abs(callback.curve[0][1]["bank/gain_forward_nats/mean"]) < 1e-6
    # The last line is the trained model, measured here from its folder.
    watched.save_model(str(tmp_path / "model"))
    teacher = load_model(micro_lab.teacher, dtype="float32")
    (gain,) = measure_gains(bank, [tmp_path / "model"], teacher)
    for name, value in gain.summary().items():
        if str(name).startswith("gain_") and not np.isnan(value):
            assert logged[4][f"bank/{name}"] == pytest.approx(value, abs=1e-6), name
    assert logged[4]["bank/gain_forward_nats/mean"] != 0


def test_the_callback_refuses_another_student_or_teacher(bank, micro_lab, trained, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path / "x")
    with pytest.raises(ConfigError, match="every=0"):
        BankCallback.attach(trainer, bank, every=0)
    with pytest.raises(DataError, match="this teacher is not"):
        BankCallback(bank, load_model(trained), print)
    BankCallback.attach(trainer, bank)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    with pytest.raises(DataError, match="the bank is of another student"):
        trainer.train()


def test_a_bank_from_a_trainers_rollouts(micro_lab, teacher, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path / "x", max_steps=3)
    collector, seen = RolloutCollector(num_completions=6), []
    trainer.observers += [
        collector,
        lambda scored: seen.extend(
            ids[mask.bool()].tolist()
            for ids, mask in zip(
                scored.batch["completion_ids"], scored.batch["completion_mask"], strict=True
            )
        ),
    ]
    trainer.train()
    rollouts = collector.rollouts()
    assert rollouts.completion_ids == seen[:6] and len(seen) == 12
    assert rollouts.settings["first_step"] == 0 and rollouts.settings["last_step"] == 1
    student = load_model(micro_lab.student)
    bank = FixedContextBank.freeze(student, teacher, make_tokenizer(), rollouts, tmp_path / "bank")
    assert bank.manifest["rollouts"]["source"] == "trainer"
    with pytest.raises(DataError, match="no completions were collected"):
        RolloutCollector(2).rollouts()
