"""A teacher that fails in mid-run is told once, with the cause; an honest one is not."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_trainer import make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from taopd.models.prompts import load_prompts
from taopd.signals import signals_from_logprobs, taken
from taopd.teachers import LocalTeacher
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from taopd.trainer.watches.teacher_watch import Look, TeacherWatch
from tests.conftest import WORDS
from tests.e2e.test_trainer import CPU, OURS


@torch.no_grad()
def sharp(model):
    """Random weights are near to uniform; a teacher is not."""
    model.lm_head.weight.mul_(30.0)


def lose_head(teacher, student):
    teacher.lm_head.weight.zero_()


def lose_last_norm(teacher, student):
    teacher.model.norm.weight.zero_()


def draw_weights_anew(teacher, student):
    for parameter in teacher.parameters():
        parameter.normal_(std=0.02)


def lose_embeddings(teacher, student):
    teacher.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[5:6].clone())


def become_the_student(teacher, student):
    teacher.forward, teacher.model, teacher.lm_head = (
        student.forward,
        student.model,
        student.lm_head,
    )


def become_the_student_in_16_bits(teacher, student):
    """A server that loads the student after each step."""
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        own.copy_(other.bfloat16())


def permute_head(teacher, student):
    teacher.lm_head.weight.copy_(teacher.lm_head.weight.roll(7, 0))


class Break(TrainerCallback):
    """Breaks the teacher after two steps; one that follows the student, after every further one."""

    def __init__(self, how, teacher, student):
        self._break = lambda: how(teacher, student)
        self._again = how is become_the_student_in_16_bits

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 or (state.global_step > 2 and self._again):
            self._break()


def warnings_of(folder):
    path = folder / "run/warnings.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["source"] == "teacher"]


BREAKS = [
    (lose_head, "same probability"),
    (lose_last_norm, "same probability"),
    (draw_weights_anew, "same probability"),
    (lose_embeddings, "does not read the text"),
    (become_the_student, "one model"),
    (become_the_student_in_16_bits, "one model"),
    (permute_head, "another one"),
    (lambda teacher, student: None, None),
]


@pytest.mark.parametrize(("how", "told"), BREAKS)
def test_a_teacher_that_fails_is_told_once_with_the_cause(micro_lab, tmp_path, how, told):
    # A student of the teacher's family, as in use: D is small, and a loss of the teacher stands out.
    related = replace(micro_lab, student=micro_lab.teacher)
    trainer = make_trainer(related, tmp_path, max_steps=6, learning_rate=1e-3)
    sharp(trainer.teacher_model)
    sharp(trainer.model)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.2)
    trainer.add_callback(Break(how, trainer.teacher_model, trainer.model))
    trainer.train()
    found = warnings_of(tmp_path)
    if told is None:
        assert found == []
        return
    (warning,) = found
    assert 2 <= warning["step"] <= 3
    assert told in warning["reason"] and "Usual causes" in warning["reason"]


def test_a_teacher_elsewhere_is_watched_too(micro_lab, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    sharp(model)
    settings = {"per_device_train_batch_size": 8, "max_steps": 4, "loss": "sampled_reverse_kl"}
    trainer = TeachabilityTrainer(
        str(micro_lab.student),
        LocalTeacher(model, len(WORDS)),
        TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU | OURS | settings),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
    )
    trainer.add_callback(Break(lose_head, model, None))
    trainer.train()
    (warning,) = warnings_of(tmp_path)
    assert warning["step"] == 2 and "same probability" in warning["reason"]


def look(entropy=1.0, disagreement=0.5, gap=2.0):
    return Look(
        entropy=entropy,
        disagreement=disagreement,
        gap=gap,
        is_uniform=False,
        is_constant=False,
        is_student=False,
    )


def test_one_odd_batch_and_a_student_that_learns_are_no_failure_and_a_resumed_watch_remembers():
    told = []
    watch = TeacherWatch(1000, lambda *found: told.append(found))
    for step in range(60):
        watch.update(step, look(disagreement=2.0 * 0.9**step))
        if step % 10 == 9:
            watch.update(step, look(disagreement=8.0))
    assert told == []
    other = TeacherWatch(1000, lambda *found: told.append(found))
    other.load_checkpoint_state(watch.checkpoint_state())
    for step in range(60, 64):
        other.update(step, look(entropy=0.999 * math.log(1000)))
    (found,) = told
    assert found[:2] == (61, "teacher") and "at the start 1.00" in found[2]


@pytest.mark.parametrize(("gap", "told"), [(2.0, []), (0.1, [5])])
def test_a_student_that_has_learned_all_but_a_few_tokens_is_not_its_teacher(gap, told):
    found = []
    watch = TeacherWatch(1000, lambda step, *_: found.append(step))
    # Two batches without one of the tokens that are left, as in a task of letters at step 388.
    for step, disagreement in enumerate([0.3, 0.2, 0.3, 0.07, 0.0019, 0.0019]):
        watch.update(step, look(disagreement=disagreement, gap=gap))
    assert found == told


def test_the_gap_is_the_median_over_tokens_of_the_mean_over_ranks():
    student = torch.tensor([[0.9, 0.08, 0.02], [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]).log()
    # Alike; apart at the second rank; another order of the same probabilities.
    teacher = torch.tensor([[0.9, 0.08, 0.02], [0.7, 0.01, 0.29], [0.5, 0.2, 0.3]]).log()
    signals = signals_from_logprobs(student, teacher, torch.tensor([0, 0, 0]), k=2)
    assert Look.at(signals, 3).gap == pytest.approx(0.0, abs=1e-6)
    only = taken(signals, torch.tensor([1]))
    assert Look.at(only, 3).gap == pytest.approx(math.log(0.29 / 0.2) / 2)


@pytest.mark.parametrize("kind", ["uniform", "student"])
def test_the_first_batch_is_compared_with_no_other(kind):
    told = []
    watch = TeacherWatch(1000, lambda *found: told.append(found[2]))
    watch.update(0, replace(look(), **{f"is_{kind}": True}))
    assert "nan" not in told[0] and "before" not in told[0] and "at the start" not in told[0]
