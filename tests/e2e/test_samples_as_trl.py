"""At equal seed and weights the trainer samples what TRL's samples; in bf16 it then computes otherwise."""

import pytest
import torch
from transformers import set_seed
from trl import DistillationConfig, DistillationTrainer

from taopd import TeachabilityConfig, TeachabilityTrainer, load_prompts

STEPS = 3
TOKENS = 6


def batches(micro_lab, folder, cls, **settings) -> list[tuple[list, list]]:
    """Prompts and completions of every batch of a run, as TRL's sampling stage returns them."""
    seen = []
    stage = DistillationTrainer._generate_and_score_completions

    def noted(self, inputs):
        batch = stage(self, inputs)
        parts = [
            [row[valid.bool()].tolist() for row, valid in zip(ids, mask, strict=True)]
            for ids, mask in (
                (batch[f"{name}_ids"], batch[f"{name}_mask"]) for name in ("prompt", "completion")
            )
        ]
        seen.append(tuple(parts))
        return batch

    shared = {
        **{"output_dir": str(folder), "max_steps": STEPS, "seed": 5, "use_cpu": True},
        **{"per_device_train_batch_size": 4, "max_completion_length": TOKENS, "report_to": "none"},
        # Equal weights: a rate that leaves float32 as it is.
        **{"learning_rate": 1e-30, "lr_scheduler_type": "constant", "weight_decay": 0.0},
        **{"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True},
        **settings,
    }
    # Eight prompts: the run goes through the set more than once, and each time in another order.
    data = load_prompts(str(micro_lab.prompts), split="train").select(range(8))
    models = str(micro_lab.student), str(micro_lab.teacher)
    set_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_generate_and_score_completions", noted)
        if cls is DistillationTrainer:
            trainer = cls(*models, DistillationConfig(**shared), train_dataset=data)
        else:
            args = TeachabilityConfig(score_top_k=4, **shared)
            trainer = cls(*models, args, train_dataset=data)
        trainer.train()
    return seen


@pytest.mark.parametrize("settings", [{"bf16": False}, {"bf16": True}], ids=["float32", "bf16"])
def test_every_batch_is_trls(micro_lab, tmp_path, settings):
    """With what the default adds: scoring, draws for the selection and the anchor, the guard."""
    theirs = batches(micro_lab, tmp_path / "trl", DistillationTrainer, **settings)
    ours = batches(micro_lab, tmp_path / "ours", TeachabilityTrainer, **settings)
    assert len(theirs) == STEPS
    assert ours == theirs
    # The draws differ from step to step, so that equal batches say something.
    assert len({str(batch) for batch in theirs}) == STEPS


def test_accumulated_micro_batches_are_sampled_together_as_trls(micro_lab, tmp_path):
    settings = {"bf16": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    theirs = batches(micro_lab, tmp_path / "trl", DistillationTrainer, **settings)
    assert batches(micro_lab, tmp_path / "ours", TeachabilityTrainer, **settings) == theirs


@pytest.mark.parametrize("cls", [DistillationTrainer, TeachabilityTrainer])
def test_bf16_reaches_our_loss_and_not_trls(micro_lab, tmp_path, cls, monkeypatch):
    """The guide lists it, and bench_real has an arm for it. Once TRL's does, both go."""
    found, sampling = set(), []
    generate = cls._generate_single_turn

    def sampled(self, *args, **kwargs):
        sampling.append(True)
        try:
            return generate(self, *args, **kwargs)
        finally:
            sampling.pop()

    monkeypatch.setattr(cls, "_generate_single_turn", sampled)
    linear = torch.nn.Linear.forward

    def noted(self, states):
        out = linear(self, states)
        if not sampling:
            found.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    batches(micro_lab, tmp_path, cls, bf16=True, max_steps=1)
    ours = cls is TeachabilityTrainer
    assert (torch.bfloat16 if ours else torch.float32) in found
    assert ours or found == {torch.float32}
