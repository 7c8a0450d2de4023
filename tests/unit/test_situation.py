"""Situation: where a pair's disagreement lies. Oracles: sums over tokens in plain Python; counts of a run."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from taopd import cli
from taopd.losses.reduction import LEAST_RELEASE, start_share
from taopd.runs.limits import situation_words
from taopd.signals import reach_from_logprobs, signals_from_logprobs, situation
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.settings.methods import METHODS, running
from taopd.trainer.watches.situation_watch import STEPS, SituationWatch
from tests.conftest import is_documented, write_config


def rows(num, vocab, seed, sharpness=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(num, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def test_shares_are_sums_of_d_by_kind():
    initial, student, teacher = rows(300, 12, 0), rows(300, 12, 1), rows(300, 12, 2)
    signals = signals_from_logprobs(student, teacher, torch.zeros(300).long(), k=3)
    signals = replace(signals, reach=reach_from_logprobs(initial, teacher, threshold=0.01))
    sums = [0.0, 0.0, 0.0, 0.0]
    columns = (signals.disagreement, signals.compatibility, signals.reach)
    for d, c, r in zip(*(column.tolist() for column in columns), strict=True):
        sums[2 if r <= 0.5 else 0 if c > 0.5 else 1] += d
    found = situation(signals, threshold=0.01)
    assert tuple(found) == pytest.approx(sums) and min(sums[:3]) > 0.0
    assert sum(found.shares) == pytest.approx(1.0)
    assert tuple(found + found) == pytest.approx([2 * each for each in sums])


def test_without_an_initial_student_the_one_at_hand_is_judged_by_both_lists():
    """K of the whole vocabulary: nothing is left open, and the bound is r itself."""
    student, teacher = rows(200, 6, 3), rows(200, 6, 4)
    for k in (6, 2):
        signals = signals_from_logprobs(student, teacher, torch.zeros(200).long(), k=k)
        truth = replace(signals, reach=reach_from_logprobs(student, teacher, threshold=0.02))
        mine, exact = situation(signals, threshold=0.02), situation(truth, threshold=0.02)
        assert mine.out_of_reach >= exact.out_of_reach - 1e-9
        if k == 6:
            assert tuple(mine) == pytest.approx(tuple(exact))
    listless = replace(signals, student_at_teacher_ids=None, teacher_at_student_ids=None)
    assert situation(listless, threshold=0.02).out_of_reach >= mine.out_of_reach - 1e-9


def test_the_words_name_the_arm_to_compare_with():
    words = situation_words(0.5, 0.09, 0.41, method="anchored")
    assert "41% is out of reach (it hardly ever says them)" in words
    assert "full distillation" in words and "method: reach" not in words
    assert "loss: forward_kl" in words
    bound = situation_words(0.5, 0.09, 0.41, method="anchored", at_most=True)
    assert bound.count("at most 41%") == 2 and "at most" not in words
    assert "method: reach" in situation_words(0.5, 0.4, 0.1, method="anchored")
    assert "compare with" not in situation_words(0.9, 0.05, 0.05, method="anchored")


def test_the_teachers_own_end_is_not_called_a_word_that_is_taught_last():
    """Of six ids the last ends the teacher's texts alone; the student hardly ever says it."""
    student, teacher = rows(200, 6, 7), rows(200, 6, 8)
    student[:, 5] -= 20.0
    teacher[:100, 5], teacher[100:, 5] = 20.0, -20.0
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    signals = signals_from_logprobs(student, teacher, torch.zeros(200).long(), k=2)
    with_ends = situation(signals, threshold=0.02, foreign_ends=[5])
    ends, plain = signals.disagreement[:100].double().sum(), situation(signals, threshold=0.02)
    assert with_ends.foreign_ends == pytest.approx(float(ends)) and plain.foreign_ends == 0.0
    assert sum(with_ends) == pytest.approx(sum(plain))
    assert with_ends.out_of_reach <= plain.out_of_reach - 0.99 * float(ends)
    words = situation_words(*with_ends.shares, method="reach")
    assert "is on the teacher's own end token" in words
    assert "end token" not in situation_words(*plain.shares, method="reach")


@pytest.mark.parametrize("method", ["reach", "published"])
def test_a_short_run_is_not_told_that_its_second_half_teaches_what_is_out_of_reach(method):
    """In 100 steps the start is let go only at the end."""
    words = situation_words(0.5, 0.09, 0.41, method=method)
    assert start_share(LEAST_RELEASE - 1, LEAST_RELEASE) > 0
    assert f"not before step {LEAST_RELEASE}:" in words and "second half" not in words


@pytest.mark.parametrize("settings", [{}, *({"method": name} for name in METHODS)], ids=str)
@pytest.mark.parametrize("whole", [{}, {"selector": "full"}, {"budget": 1.0}], ids=str)
def test_no_run_is_told_to_compare_with_itself(settings, whole):
    """Nor what a method does that is not its own."""
    args = TeachabilityConfig(output_dir="x", bf16=False, use_cpu=True, **settings, **whole)
    words = situation_words(0.2, 0.4, 0.4, method=running(args))
    compared = words.partition("out of reach (it hardly ever says them)")[2]
    assert ("full distillation" in compared) == (not whole)
    own = args.method if not whole else None
    assert ("method: reach is the arm" in compared) == (own != "reach")
    assert ("method: anchored" in compared) == (own == "anchored")


def test_the_first_steps_are_added_up_and_said_once(caplog):
    logging.getLogger("taopd").propagate = True
    student, teacher = rows(50, 12, 5), rows(50, 12, 6)
    signals = signals_from_logprobs(student, teacher, torch.zeros(50).long(), k=3)
    seen = []

    def record(name, value):
        seen.append((name, value))

    watch = SituationWatch(0.01, record, method="anchored")
    with caplog.at_level(logging.INFO, logger="taopd.trainer.watches.situation_watch"):
        for number in range(1, 10):
            watch(SimpleNamespace(signals=signals, number=number))
        # Interrupted and resumed.
        again = SituationWatch(0.01, record, method="anchored")
        again.load_checkpoint_state(watch.checkpoint_state())
        for number in range(10, STEPS + 5):
            again(SimpleNamespace(signals=signals, number=number))
        again.on_train_end(None, None, None)
    assert len(seen) == 4 * STEPS and all(is_documented(name) for name, _ in seen)
    shares = situation(signals, threshold=0.01).shares
    assert dict(seen)["situation/out_of_reach"] == pytest.approx(shares.out_of_reach)
    said = [record.message for record in caplog.records if "situation" in record.message]
    assert said == [f"situation: {situation_words(*shares, method='anchored', at_most=True)}"]


def test_what_both_lists_leave_open_is_not_called_out_of_reach(micro_lab, tmp_path, capsys):
    """Two random models: most of the teacher's mass is on neither list, all of it on words that the student
    says as often as others."""
    config = write_config(
        micro_lab, tmp_path, score_top_k=2, per_device_train_batch_size=4, max_completion_length=6
    )
    cli.main(["check", str(config), "--json"])
    items = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert items["off support"]["figures"]["off_support_mass"] > 0.5
    figures = items["situation"]["figures"]
    assert figures["within_reach_share"] > 0.9 and figures["out_of_reach_share"] == 0.0
