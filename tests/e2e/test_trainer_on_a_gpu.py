"""The trainer on a GPU: the same numbers as on the CPU, as TRL's and as the models' own forward."""

import pytest
import torch
from test_trainer import OURS, gradients_on_fixed_completions, make_trainer, relative_error
from trl import DistillationTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = {"use_cpu": False}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selector": "full"},
        {"method": "published"},
        {"method": "published", "loss": "sampled_reverse_kl", "budget": 0.3},
        {"gradient_window": 2},
        {"bf16": True},
        {"bf16": True, "gradient_window": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"selector": "random"},
        {"num_iterations": 2, "loss": "sampled_reverse_kl"},
    ],
    ids=str,
)
def test_trains_and_logs_finite_numbers(micro_lab, tmp_path, settings):
    trainer = make_trainer(micro_lab, tmp_path, max_steps=3, **GPU, **settings)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == "cuda"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(losses)))
    drift = [entry.get("rollout/drift_nats/mean", 0.0) for entry in trainer.state.log_history]
    assert max(drift) < (0.1 if settings.get("bf16") else 1e-3)


def test_full_selection_equals_trl(micro_lab, tmp_path):
    ours = make_trainer(micro_lab, tmp_path / "a", selector="full", loss="reverse_kl", **GPU)
    theirs = make_trainer(micro_lab, tmp_path / "b", DistillationTrainer, beta=1.0, **GPU)
    our_loss, our_gradients = gradients_on_fixed_completions(ours)
    their_loss, their_gradients = gradients_on_fixed_completions(theirs)
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    for name, gradient in our_gradients.items():
        assert relative_error(gradient, their_gradients[name]) < 1e-4, name


@pytest.mark.parametrize(
    "settings", [{}, {"method": "published"}, {"gradient_window": 64}], ids=str
)
def test_loss_and_gradients_equal_the_cpus(micro_lab, tmp_path, settings):
    cpu = gradients_on_fixed_completions(make_trainer(micro_lab, tmp_path / "a", **settings))
    gpu = gradients_on_fixed_completions(make_trainer(micro_lab, tmp_path / "b", **settings, **GPU))
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-4)
    for name, gradient in cpu[1].items():
        assert relative_error(gpu[1][name].cpu(), gradient) < 1e-3, name


def test_signals_equal_those_of_the_models_own_forward(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, **GPU)
    seen = []
    trainer.observers.append(seen.append)
    gradients_on_fixed_completions(trainer)
    scored, k = seen[0], OURS["score_top_k"]
    batch = scored.batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    start = batch["prompt_ids"].shape[1]
    with torch.no_grad():
        student, teacher = (
            model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1].double()
            .log_softmax(-1)[batch["completion_mask"].bool()]
            for model in (trainer.model, trainer.teacher_model)
        )  # fmt: skip
    support = student.topk(k, dim=-1).indices
    compatibility = teacher.gather(1, support).exp().sum(-1)
    found = scored.signals.compatibility.to(compatibility.device)
    torch.testing.assert_close(found.double(), compatibility, atol=1e-4, rtol=0)
