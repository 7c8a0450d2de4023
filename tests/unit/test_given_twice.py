"""One folder, file or name twice in a command that takes several. Oracle: exit code 2, one line, no file."""

import os
import shutil

import pytest

from taopd import cli
from taopd.errors import ConfigError
from taopd.report.page import write_report
from tests.browser import make_pages


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_pages.small(tmp_path / "runs")[0]
    os.symlink(made, tmp_path / "link")
    return os.path.relpath(made, tmp_path)


SPELLINGS = ("{0}", "{0}/", "./{0}", "{0}/../{1}", "link", "{2}")
COMMANDS = {
    "report": ["report", "{0}", "{1}", "-o", "x.html"],
    "compare": ["compare", "{0}", "{1}", "--output", "x"],
    "gain": ["diagnose", "gain", "bank", "--after", "{0}", "{1}", "--output", "x"],
    "conformance": ["conformance", "{0}", "{1}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_folder_twice_is_refused_however_it_is_written(run, capsys, command, spelling):
    again = spelling.format(run, os.path.basename(run), os.path.abspath(run))
    before = sorted(os.listdir())
    assert cli.main([word.format(run, again) for word in COMMANDS[command]]) == 2
    error = capsys.readouterr().err.splitlines()
    # A path has no trailing or leading part that says nothing.
    named = os.path.normpath(again) if ".." not in again else again
    assert len(error) == 1 and "is given twice" in error[0] and named in error[0]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["inspect", "x", "--rollout", "1", "--rollout", "1"], "--rollout 1 is given twice"),
        (["bench", "select", "select"], "select is given twice"),
        (
            ["leaderboard", "--selector", "tip", "--selector", "tip"],
            "--selector tip is given twice",
        ),
        (["leaderboard", "--variant", "a", "--variant", "a"], "--variant a is given twice"),
    ],
)
def test_a_name_twice_is_refused(run, capsys, argv, told):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and told in error[0]


def test_a_report_from_python_and_an_arm_beside_its_study(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"is given twice, first as"):
        write_report([run, tmp_path / run], tmp_path / "x.html")
    shutil.copytree(run, "study/arms/a")
    os.remove("study/arms/a/results.json")
    assert cli.main(["report", "study", "study/arms/a", "-o", "x.html"]) == 2
    assert "study/arms/a is given twice: give it once" in capsys.readouterr().err
    assert not os.path.exists("x.html")
    # Two runs of the same content and name are two.
    shutil.copytree(run, f"other/{os.path.basename(run)}")
    assert cli.main(["report", run, f"other/{os.path.basename(run)}", "-o", "x.html"]) == 0
