"""NaN and infinity put where they could arise. Oracle: weights and optimizer before the step, and the run
in which nothing was bad."""

import json
import math

import pytest
import torch
from test_resume import SAVED, assert_same_weights
from test_trainer import make_trainer, weights_of
from transformers import TrainerCallback
from trl import DistillationTrainer

from taopd.errors import ConfigError, DataError, NumericsError
from taopd.trainer.checkpoint.state_file import load_tree

STEPS, BAD = 4, 2
SETTINGS = SAVED | {"max_steps": STEPS, "save_strategy": "no"}
FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


class Before(TrainerCallback):
    """Keeps weights and optimizer of every step's beginning."""

    def __init__(self, trainer):
        self.trainer, self.states = trainer, []
        trainer.add_callback(self)

    def _keep(self):
        optimizer = self.trainer.optimizer.state_dict()["state"]
        moments = {i: {k: v.clone() for k, v in one.items()} for i, one in optimizer.items()}
        self.states.append((weights_of(self.trainer), moments))

    def on_step_begin(self, args, state, control, **kwargs):
        self._keep()

    def on_train_end(self, args, state, control, **kwargs):
        self._keep()


def same(one, other) -> bool:
    weights = all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    moments = one[1].keys() == other[1].keys() and all(
        torch.equal(value, other[1][index][name])
        for index, state in one[1].items()
        for name, value in state.items()
    )
    return weights and moments


def bad_student(trainer, steps):
    states = trainer._get_last_hidden_state

    def spoiled(model, *args, **kwargs):
        hidden = states(model, *args, **kwargs)
        if model is trainer.model and trainer.state.global_step in steps:
            hidden = hidden.masked_fill(torch.arange(hidden.shape[1])[:, None] == 1, math.nan)
        return hidden

    trainer._get_last_hidden_state = spoiled


def bad_teacher(trainer, steps):
    states = trainer._get_last_hidden_state

    def spoiled(model, *args, **kwargs):
        hidden = states(model, *args, **kwargs)
        bad = model is trainer.teacher_model and trainer.state.global_step in steps
        return hidden * math.inf if bad else hidden

    trainer._get_last_hidden_state = spoiled


def bad_loss(trainer, steps):
    function = trainer._loss_function

    def spoiled(logprobs, targets):
        losses = function(logprobs, targets)
        return losses / 0.0 if trainer.state.global_step in steps else losses

    trainer._loss_function = spoiled


def bad_gradient(trainer, steps):
    def spoil(gradient):
        return gradient * math.nan if trainer.state.global_step in steps else gradient

    trainer.model.model.layers[1].mlp.up_proj.weight.register_hook(spoil)


PLACES = {
    "student": (
        bad_student,
        r"the student's logits are NaN or infinite at step 2, completion 0 .*1",
    ),
    "teacher": (
        bad_teacher,
        r"the teacher's logits are NaN or infinite at step 2, completion 0 .*0",
    ),
    "loss": (bad_loss, r"loss term: the loss is NaN or infinite .*completion \d of the batch, pos"),
    "gradient": (
        bad_gradient,
        r"step 2: the gradient is NaN .*1 parameters, first model.layers.1.mlp",
    ),
}


@pytest.fixture(scope="module")
def clean(micro_lab, tmp_path_factory):
    """Weights of the run in which nothing is bad."""
    trainer = make_trainer(micro_lab, tmp_path_factory.mktemp("clean"), **SETTINGS)
    trainer.train()
    return weights_of(trainer)


@pytest.mark.parametrize("place", PLACES)
def test_stop_leaves_the_weights_saves_the_batch_and_can_be_resumed(
    micro_lab, tmp_path, place, clean
):
    spoil, message = PLACES[place]
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS)
    seen, before = [], Before(trainer)
    trainer.observers.append(seen.append)
    spoil(trainer, {BAD})
    with pytest.raises(NumericsError, match=message) as caught:
        trainer.train()
    assert "no update was made" in str(caught.value)
    assert "go on with trainer.train(resume_from_checkpoint=True)" in str(caught.value)
    assert len(before.states) == BAD + 1
    assert_same_weights(trainer, before.states[-1][0])
    about = json.loads((tmp_path / "run/bad_numbers/step-000002.json").read_text())
    tensors = load_tree(tmp_path / "run/bad_numbers" / about["tensors"])
    assert about["step"] == BAD and str(about["problem"]) in str(caught.value)
    rollout = about["rollouts"][0]
    row = rollout["completion_index"]
    kept = tensors["completion_mask"][row].bool()
    assert tensors["completion_ids"][row][kept].tolist() == rollout["completion_ids"] != []
    assert rollout["prompt"] and (about["position"] is None) == (place == "gradient")
    resumed = make_trainer(micro_lab, tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{BAD}"))
    assert_same_weights(resumed, clean)


class Spoiled(TrainerCallback):
    """An update after which a weight is infinite, as with a learning rate of 1e30."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == BAD:
            model.model.layers[1].mlp.up_proj.weight.data.fill_(math.inf)


def test_weights_that_are_no_numbers_are_not_saved(micro_lab, tmp_path):
    """A generation batch is used for two steps: the second one finds the weights, without sampling."""
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS, num_iterations=STEPS)
    trainer.add_callback(Spoiled())
    with pytest.raises(NumericsError, match=r"are not saved\. There is no checkpoint yet"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_does_not_end_well_with_weights_that_are_no_numbers(micro_lab, tmp_path):
    """No checkpoint and no step comes after the last update: nothing else would find them."""
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | {"max_steps": BAD})
    trainer.add_callback(Spoiled())
    with pytest.raises(NumericsError, match=r"step 2: the update made weights NaN .*no checkpoint"):
        trainer.train()
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_last_good_checkpoint_stays(micro_lab, tmp_path):
    trainer = make_trainer(
        micro_lab, tmp_path, **SETTINGS | {"save_strategy": "steps", "save_total_limit": 1}
    )
    trainer.add_callback(Spoiled())
    with pytest.raises(
        NumericsError, match=r"step 2: the update made weights NaN .*newest .*checkpoint-1"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("division", [{}, FOUR], ids=["one micro-batch", "four"])
@pytest.mark.parametrize("place", PLACES)
def test_skip_makes_no_update_counts_and_goes_on(micro_lab, tmp_path, place, division, caplog):
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | division, on_bad_numbers="skip")
    before = Before(trainer)
    PLACES[place][0](trainer, {BAD})
    trainer.train()
    still = [same(one, other) for one, other in zip(before.states, before.states[1:], strict=False)]
    assert still == [step == BAD for step in range(STEPS)]
    logged = [log["numerics/skipped"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [float(step == BAD) for step in range(STEPS)]
    assert "step 2 makes no update" in caplog.text and "(bad numbers); 1 so far" in caplog.text
    assert (tmp_path / "run/bad_numbers/step-000002.json").exists()
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_gradient_that_no_loss_scale_mends_ends_a_run_in_fp16(micro_lab, tmp_path, optim):
    """A scaler halves its factor at every skipped step, and would go on to the end of the run."""
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | {"optim": optim, "max_steps": 9})
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = weights_of(trainer)
    bad_gradient(trainer, set(range(9)))
    with pytest.raises(NumericsError, match=r"step 2: the gradient is NaN .*no update was made"):
        trainer.train()
    assert_same_weights(trainer, before)


def test_a_gradient_that_a_loss_scale_mends_is_the_scalers(micro_lab, tmp_path):
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | {"max_steps": 3})
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    bad_gradient(trainer, {0})
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1.0
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["update/norm"] > 0 for log in logs] == [False, True, True]


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_what_needs_the_gradient_before_the_update_is_refused_where_layers_update(
    micro_lab, tmp_path, monkeypatch, optim
):
    """Their weights move within the backward: update/norm was 0 at every step, and max_update_norm did
    nothing."""
    # It refuses them first: their packages are not installed here.
    monkeypatch.setattr("taopd.trainer.build.given_arguments.check_optim", lambda *_: None)
    for settings in (
        {"max_update_norm": 0.1},
        {"match_update_norm": 0.1},
        {"on_bad_numbers": "skip"},
    ):
        with pytest.raises(ConfigError, match=f"optim={optim}.* updates within the backward"):
            make_trainer(micro_lab, tmp_path, **SETTINGS | {"optim": optim}, **settings)
    for name, measured in ((optim, False), ("adafactor", True)):
        trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | {"optim": name})
        kinds = {type(each).__name__ for each in trainer.callback_handler.callbacks}
        assert ("UpdateNorm" in kinds) == measured


def test_too_many_in_a_row_stop_anyway(micro_lab, tmp_path):
    settings = SETTINGS | {"on_bad_numbers": "skip", "max_skipped_steps": 2, "max_steps": 9}
    trainer = make_trainer(micro_lab, tmp_path, **settings)
    bad_gradient(trainer, {1, 3, 4, 5})
    with pytest.raises(NumericsError, match="step 5: 2 steps in a row made no update"):
        trainer.train()
    assert trainer.state.global_step == 5


def test_every_step_of_a_bad_generation_batch_is_skipped_after_a_resume_too(micro_lab, tmp_path):
    settings = SETTINGS | {"num_iterations": 2, "on_bad_numbers": "skip", "save_strategy": "steps"}
    whole = make_trainer(micro_lab, tmp_path, **settings)
    bad_teacher(whole, {2})
    whole.train()
    expected = weights_of(whole)
    resumed = make_trainer(micro_lab, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(resumed, expected)
    skipped = [log["numerics/skipped"] for log in resumed.state.log_history if "loss" in log]
    assert skipped == [0.0, 0.0, 1.0, 1.0]


def sample(num_empty):
    def generate(self, prompt_ids, *_, **__):
        empty = num_empty(self.state.global_step)
        return [[] if row < empty else [5, 6, 2] for row in range(len(prompt_ids))]

    return generate


def test_empty_completions_are_data(micro_lab, tmp_path, monkeypatch, caplog):
    """Some empty: the others train, and the end token that stands in is no token. All: no update."""
    counts = {0: 0, 1: 3, 2: 8, 3: 0}
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", sample(counts.get))
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS)
    before, seen = Before(trainer), []
    trainer.observers.append(seen.append)
    trainer.train()
    assert [len(scored.positions) for scored in seen] == [24, 15, 0, 24]
    still = [same(one, other) for one, other in zip(before.states, before.states[1:], strict=False)]
    assert still == [False, False, True, False]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["numerics/skipped"] for log in logs] == [0.0, 0.0, 1.0, 0.0]
    assert [log["rollout/empty_completions"] for log in logs] == [0.0, 0.375, 1.0, 0.0]
    assert "(no token to train on); 1 so far" in caplog.text


def test_nothing_but_empty_completions_stops_with_the_reason(micro_lab, tmp_path, monkeypatch):
    monkeypatch.setattr(
        DistillationTrainer, "_generate_single_turn", sample(lambda step: 8 * (step > 0))
    )
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | {"max_steps": 9}, max_skipped_steps=3)
    with pytest.raises(
        DataError, match=r"3 steps in a row .* end-of-sequence ids.*4 steps are sav"
    ):
        trainer.train()
    resumed = make_trainer(micro_lab, tmp_path, **SETTINGS | {"max_steps": 5})
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", sample(lambda step: 0))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_a_batch_that_is_masked_throughout_is_data(micro_lab, tmp_path, monkeypatch):
    plain = DistillationTrainer._generate_and_score_completions

    def masked(self, inputs):
        batch = plain(self, inputs)
        share = float(self.state.global_step != 1)
        return batch | {"tool_mask": (batch["completion_mask"] * share).long()}

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", masked)
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | FOUR)
    before = Before(trainer)
    trainer.train()
    still = [same(one, other) for one, other in zip(before.states, before.states[1:], strict=False)]
    assert still == [False, True, False, False]


def test_settings_out_of_range_are_refused(micro_lab, tmp_path):
    with pytest.raises(ConfigError, match="on_bad_numbers='ignore': must be one of stop, skip"):
        make_trainer(micro_lab, tmp_path, on_bad_numbers="ignore")
    with pytest.raises(ConfigError, match="max_skipped_steps=0: must be at least 1"):
        make_trainer(micro_lab, tmp_path, max_skipped_steps=0)


@pytest.mark.parametrize("window", [None, 0, 2])
def test_a_bad_state_in_training_runs_no_forward_again(micro_lab, tmp_path, window):
    """Under FSDP2 a forward that one process runs alone waits for the others, which do not run it.

    Oracle: as many forwards of the student's backbone in the bad step as in every other.
    """
    settings = SETTINGS | FOUR | {"gradient_window": window, "on_bad_numbers": "skip"}
    trainer = make_trainer(micro_lab, tmp_path, **settings)
    forwards = dict.fromkeys(range(STEPS), 0)

    def count_and_spoil(norm, inputs, hidden):
        step = trainer.state.global_step
        if torch.is_grad_enabled() and trainer.model.training:
            forwards[step] += 1
            return hidden * math.nan if step == BAD else hidden
        return hidden

    trainer.model.model.norm.register_forward_hook(count_and_spoil)
    trainer.train()
    assert len(set(forwards.values())) == 1 and forwards[BAD] == 4
    about = json.loads((tmp_path / "run/bad_numbers/step-000002.json").read_text())
    place = f"completion {about['completion']} of the batch, position {about['position']}"
    assert place in about["problem"] and len(about["rollouts"]) == 1


def test_the_place_of_a_bad_number_is_data_and_not_read_from_the_text(micro_lab, tmp_path):
    """A teacher that is bad at one token: the error's fields, whatever its words are."""
    trainer = make_trainer(micro_lab, tmp_path, **SETTINGS | FOUR)
    states = trainer._get_last_hidden_state
    calls = []

    def spoiled(model, *args, **kwargs):
        hidden = states(model, *args, **kwargs)
        if model is trainer.teacher_model:
            calls.append(len(hidden))
            if len(calls) == 2:  # the second micro-batch of two completions
                hidden = hidden.clone()
                hidden[1, 1] = math.inf
        return hidden

    trainer._get_last_hidden_state = spoiled
    trainer._teacher._agreed = True  # The comparison before the first step runs forwards too.
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    cause = caught.value
    about = json.loads((tmp_path / "run/bad_numbers/step-000000.json").read_text())
    assert (about["completion"], about["position"]) == (3, 1)
    assert isinstance(cause, NumericsError) and calls == [2, 2, 2, 2], "every forward was run"


@pytest.mark.parametrize("empty_in", ["training", "evaluation"])
def test_an_evaluation_decides_nothing_about_a_batch_that_goes_on_training(
    micro_lab, tmp_path, monkeypatch, caplog, empty_in
):
    """Two steps on one generation batch, an evaluation between them: one is empty, the other is not."""

    def generate(self, prompt_ids, *args, **kwargs):
        # A step takes eight prompts, an evaluation four.
        empty = (len(prompt_ids) == 8) == (empty_in == "training")
        return [[] if empty else [5, 6, 2] for _ in prompt_ids]

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", generate)
    rows = [{"prompt": "1 + 2 ="}] * 4
    evaluated = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        micro_lab, tmp_path, **SETTINGS | {"max_steps": 2, "num_iterations": 2} | evaluated
    )
    before = Before(trainer)
    trainer.train()
    still = [same(one, other) for one, other in zip(before.states, before.states[1:], strict=False)]
    assert still == [empty_in == "training"] * 2
    assert caplog.text.count("(no token to train on)") == 2 * (empty_in == "training")
