"""Commands whose output cannot be printed: a full disk, a reader that has gone, no stdout at all."""

import os
import subprocess
import sys

import pytest

from taopd import cli
from taopd.cli import plan

PLAN = ["plan", "--student", "Qwen3-1.7B", "--teacher", "Qwen3-4B"]
COMMANDS = (["--help"], ["--version"], ["train", "--help"], PLAN, [*PLAN, "--json"])


def run(arguments, stdout, *, prepare=None):
    """Exit code and stderr of a command in a process of its own."""
    argv = [sys.executable, "-m", "taopd", *arguments]
    done = subprocess.run(
        argv, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=prepare, timeout=60
    )
    return done.returncode, done.stderr


@pytest.fixture
def left():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux alone has /dev/full")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(arguments, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        code, told = run(arguments, full)
    line = f"taopd {arguments[0]}: error: cannot print: No space left on device\n"
    assert (code, told) == (2, line)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error_to_speak_of(left, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    for arguments in (["--help"], PLAN, ["train", "--help"]):
        assert run(arguments, left) == (1, "")
    code, told = run(["train", "--help-all"], left)
    # It loads libraries, and says so on a machine that needs long for it.
    assert (code, told.removeprefix("taopd train: loading libraries\n")) == (1, "")


def test_text_that_the_encoding_of_stdout_lacks_is_escaped(monkeypatch, capfdbinary):
    monkeypatch.setattr(plan, "run", lambda rest: print("D\u1d38 \u65e5 \udcc3"))
    for encoding in ("ascii", "latin-1", "utf-8"):
        with open(os.dup(1), "w", encoding=encoding) as out:
            monkeypatch.setattr(sys, "stdout", out)
            cli.main(PLAN)
        told = capfdbinary.readouterr().out.rstrip()
        text = "D\u1d38 \u65e5".encode(encoding, "backslashreplace")
        assert told == text + rb" \udcc3"


def test_without_stdout_a_command_works():
    assert run(PLAN, None, prepare=lambda: os.close(1)) == (0, "")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "of a worker"), OSError("elsewhere")])
def test_an_error_of_something_else_keeps_its_traceback(error, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(plan, "run", fail)
    with pytest.raises(OSError, match=r"of a worker|elsewhere"):
        cli.main(PLAN)
