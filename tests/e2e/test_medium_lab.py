"""The medium lab's script, end to end at toy size, interrupted once."""

import random
import re

import pytest

from scripts import medium_lab


def test_worked_steps_add_up_and_students_err():
    rng, wrong = random.Random(0), 0
    for _ in range(200):
        _, first, changes = medium_lab.problem(rng)
        told = medium_lab.solution(first, changes, "teacher", rng)
        assert int(re.search(r"#### (\d+)", told).group(1)) == first + sum(changes) >= 0
        mine = medium_lab.solution(first, changes, "student", rng)
        wrong += int(re.search(r"#### (-?\d+)", mine).group(1)) != first + sum(changes)
    assert 0.25 < wrong / 200 < 0.6  # One to three steps, a quarter of them wrong.


@pytest.mark.slow
def test_every_command_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        medium_lab, "ARMS", {name: medium_lab.ARMS[name] for name in ("full", "c-only-0.05")}
    )
    common = ["--root", str(tmp_path), "--tiny"]
    medium_lab.main(["data", *common])
    medium_lab.main(["pretrain", "teacher", *common, "--minutes", "0"])
    assert "run the command again" in capsys.readouterr().out
    for role in ("teacher", "student"):
        medium_lab.main(["pretrain", role, *common])
        assert f"{role}: done" in capsys.readouterr().out
    made = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    medium_lab.main(["pretrain", "teacher", *common])  # what is done is not trained on
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == made
    with pytest.raises(SystemExit, match="made with or without --tiny"):
        medium_lab.main(["pretrain", "teacher", *common[:2]])
    medium_lab.main(["arms", *common])
    assert "arms: done" in capsys.readouterr().out
    medium_lab.main(["table", *common, "--page", str(tmp_path / "medium.md")])
    page = (tmp_path / "medium.md").read_text()
    assert "| full | 1 |" in page and "| c-only-0.05 | 1 |" in page
