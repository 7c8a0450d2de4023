"""scripts/letters.py: its task, and one short run through the whole of it."""

import json
import sys

import pytest
import torch

from scripts import letters
from scripts.letters import EOS, NUM_LETTERS, PAD, prompts, student_texts, teacher_texts


@pytest.mark.parametrize("name", list(letters.SITUATIONS))
def test_the_teacher_says_the_least_letter_that_is_missing(name):
    rows, _ = prompts()
    read, said = teacher_texts(name, rows[:300], torch.Generator().manual_seed(3))
    first = NUM_LETTERS if name == "capitals" else 0
    texts = zip(rows.tolist(), read.tolist(), said.tolist(), strict=False)
    own = 0
    for prompt, heard, answers in texts:
        for place, answer in enumerate(answers):
            if EOS in heard[:place]:
                assert answer == -100 and heard[place] == PAD
                continue
            missing = sorted(set(prompt) - {token % NUM_LETTERS for token in heard[:place]})
            assert answer == (first + missing[0] if missing else EOS)
        own += answers[:7] == heard[:7]
    assert 0.2 < own / 300 < 0.6


def test_what_the_student_writes_has_the_shares_that_the_page_names():
    train, test = prompts()
    assert not set(map(tuple, train.tolist())) & set(map(tuple, test.tolist()))
    texts = student_texts("copies", train, torch.Generator().manual_seed(4))
    same = (texts[:, :6] == train).all(1).double().mean()
    assert float(same) == pytest.approx(0.8 * (1 - 0.05 * 7 / 8) ** 6, abs=0.03)
    assert bool((texts[:, 6] == EOS).all())


def test_a_short_run_writes_curves_and_a_page(tmp_path, monkeypatch):
    for name, few in (("STEPS", 2), ("EVERY", 1), ("PRETRAIN_STEPS", 2), ("SEEDS", range(1))):
        monkeypatch.setattr(letters, name, few)
    output = tmp_path / "letters.json"
    asked = ["letters", "--runs", str(tmp_path / "runs"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*asked, "--only", "orders"])
    letters.main()
    arms = json.loads(output.read_text())["arms"]
    assert [row["arm"] for row in arms] == ["reach", "full", "published"]
    assert all(len(row["greedy"]) == len(row["sampled"]) == 3 for row in arms)
    page = output.with_suffix(".md").read_text()
    assert "| orders | full | - |" in page and output.with_suffix(".png").exists()


def test_half_right_is_for_good():
    assert letters.first_half_right([0.6, 0.4, 0.5, 0.9]) == "100"
    assert letters.first_half_right([0.0, 0.9, 0.4]) == "-"
