"""`train()` a second time on one trainer. Oracle: a trainer that trains for the first time."""

import pytest
import torch
from test_resume import assert_same_weights, lines_of
from test_trainer import make_trainer, weights_of

LEFT = {
    "within a step": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "within a generation batch": {"num_iterations": 2, "max_steps": 3},
}


def make(micro_lab, folder, case):
    settings = {"max_steps": 3, "learning_rate": 1e-2, "budget": 0.3}
    return make_trainer(micro_lab, folder, **(settings | LEFT[case]))


@pytest.mark.parametrize("case", LEFT)
def test_a_second_run_reads_nothing_that_the_first_has_left(micro_lab, tmp_path, case):
    fresh = make(micro_lab, tmp_path / "fresh", case)
    start = weights_of(fresh)
    torch.manual_seed(5)
    fresh.train()
    trainer = make(micro_lab, tmp_path / "again", case)
    compute_loss, calls = trainer.compute_loss, []

    def failing(*args, **kwargs):
        calls.append(1)
        if case == "within a step" and len(calls) == 3:
            raise RuntimeError("a bug of the user's")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = failing
    if case == "within a step":
        with pytest.raises(RuntimeError, match="user's"):
            trainer.train()
    else:
        trainer.train()
        trainer.optimizer = trainer.lr_scheduler = None
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            weight.copy_(start[name])
    torch.manual_seed(5)
    trainer.train()
    assert_same_weights(trainer, weights_of(fresh))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        logs = [lines_of(tmp_path / run / "run", name) for run in ("again", "fresh")]
        assert logs[0] == logs[1] and logs[0]


def test_a_batch_that_did_not_fit_into_memory_is_smaller_everywhere(micro_lab, tmp_path):
    prompts, runs = [], {"four": 4, "three": 3}
    for name, size in runs.items():
        trainer = make_trainer(
            micro_lab,
            tmp_path / name,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
            auto_find_batch_size=True,
        )
        compute_loss, taken = trainer.compute_loss, []

        def failing(*args, of=trainer, loss=compute_loss, **kwargs):
            if of._train_batch_size == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss(*args, **kwargs)

        def listening(rows, generate=trainer._generate_and_score_completions, taken=taken):
            taken.append([row["prompt"] for row in rows])
            return generate(rows)

        trainer.compute_loss = failing
        trainer._generate_and_score_completions = listening
        trainer.train()
        assert trainer.args.per_device_train_batch_size == 3
        prompts.append(taken[-3:])
    assert prompts[0] == prompts[1] and len(prompts[0][0]) == 6
