"""The commands of README and guide, run exactly as they are printed, one after the other in one folder.

The tiny lab is smaller than the one that users get. Only parsed: what takes hours or needs GPUs.
"""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from taopd import cli
from taopd.experiments import lab as lab_room

ROOT = Path(__file__).parents[2]
SIZES = {
    "num_train_prompts": 400,
    "num_test_prompts": 20,
    "teacher_steps": 30,
    "student_steps": 30,
    "teacher_width": 16,
    "student_width": 16,
    "parallel": False,
}
LONG = {
    "taopd compare": "taopd.experiments.study.run.run_study",
    "taopd leaderboard": "taopd.experiments.lab.leaderboard.run_leaderboard",
}
"""Minutes to hours: these stop where the work would begin."""
ELSEWHERE = ("git clone", "make ", "accelerate launch")
"""`make demo` is `taopd demo` (tests/e2e/test_demo.py); the launch file's recipe is checked below."""


class Began(Exception):
    """The work of a long command would begin here."""


def printed(page: str) -> list[str]:
    """Command lines in a page's code blocks, continued lines joined."""
    # Odd pieces are inside of fences.
    pieces = re.split(r"^```\w*\n", (ROOT / page).read_text(), flags=re.MULTILINE)[1::2]
    lines = "\n".join(pieces).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("taopd ", *ELSEWHERE))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the repository's files by name, in which no run exists yet."""
    for name in ("recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = partial(lab_room.build_lab, root=tmp_path / "labs", **SIZES)
    monkeypatch.setattr(lab_room, "build_lab", lambda variant, **_: small(variant))
    monkeypatch.setattr(
        "taopd.experiments.study.run.build_lab", lambda variant, **_: small(variant)
    )
    monkeypatch.chdir(tmp_path)


def test_every_printed_command_runs(workplace, monkeypatch, capsys):
    def begin(*args, **kwargs):
        raise Began

    for path in LONG.values():
        monkeypatch.setattr(path, begin)
    commands = [line for page in ("README.md", "docs/guide.md") for line in printed(page)]
    run = []
    for line in dict.fromkeys(commands):
        if line.startswith(ELSEWHERE):
            continue
        words = shlex.split(line, comments=True)
        if any(line.startswith(name) for name in LONG):
            with pytest.raises(Began):
                cli.main(words[1:])
        else:
            assert cli.main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
        run.append(words[1])
    assert set(run) >= {"check", "train", "plan", "evaluate", "report", "inspect", "diagnose"}
    assert Path("report.html").stat().st_size > 10_000


def test_every_printed_launch_names_files_that_are_there():
    lines = [line for line in printed("docs/guide.md") if line.startswith("accelerate launch")]
    assert lines
    for line in lines:
        for name in re.findall(r"recipes/[\w./-]+", line):
            assert (ROOT / name).is_file(), name
