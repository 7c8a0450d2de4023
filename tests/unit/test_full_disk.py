"""A disk that takes no more: one message and exit code 2 of every command; the same command works again."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from taopd import cli
from taopd.cli import evaluate as command
from taopd.cli import plan
from taopd.runs.folder import MARKER
from taopd.runs.jsonl import append_jsonl, write_text
from taopd.trainer.checkpoint.resume import disk_error

PLAN = ["plan", "--student", "Qwen3-1.7B", "--teacher", "Qwen3-4B"]


def limited(arguments):
    """Exit code and last line of stderr of a command whose files may have 2,048 bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "taopd", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def test_evaluate_says_so_and_works_again(micro_lab, tmp_path):
    output = tmp_path / "evaluated"
    argv = ["evaluate", micro_lab.student, "--dataset", micro_lab.prompts, "--output", output]
    argv += ["--max-new-tokens", "8", "--num-samples", "4"]
    code, told = limited(argv)
    assert code == 2 and f"cannot write {output / 'transcripts.jsonl'} (File too large)" in told
    assert cli.main(list(map(str, argv))) == 0 and (output / "results.json").is_file()


def test_diagnose_freeze_says_so(micro_lab, tmp_path):
    argv = ["diagnose", "freeze", "--student", micro_lab.student, "--teacher", micro_lab.teacher]
    argv += ["--prompts", micro_lab.prompts, "--max-tokens", "6", "--output", tmp_path / "bank"]
    code, told = limited(argv)
    assert code == 2 and "File too large" in told and str(tmp_path / "bank") in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "cannot write a file (No space left on device)"),
        (OSError(30, "Read-only file system", "x/y"), "cannot write x/y (Read-only file system)"),
        (PermissionError(13, "Permission denied", "x"), "cannot write x (Permission denied)"),
        (FileExistsError(17, "File exists", "x"), "cannot use x (File exists)"),
    ],
)
def test_what_the_system_says_is_one_line(error, told, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(plan, "run", fail)
    assert cli.main(PLAN) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"taopd plan: error: {told}. ") and len(line.splitlines()) == 1


def test_what_could_not_be_written_is_named(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as found:
        write_text(tmp_path / "x.json", "{}")
    assert found.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "truncate", lambda path, size: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            append_jsonl(tmp_path / "x.jsonl", {"step": 1, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.filename == str(tmp_path / "x.jsonl")


def test_a_folder_keeps_what_is_not_of_the_command(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("taopd.runs.jsonl.write_jsonl", full)
    options = command._parser().parse_args(["M", "--dataset", "F", "--output", str(tmp_path)])
    with pytest.raises(OSError, match="No space left"):
        command.write_folder(options, [], json.loads("{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".taopd-run", "notes.txt"]


def test_what_to_do_is_what_the_run_folder_allows(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for made, advice in (
        (None, "start again"),
        (MARKER, "start anew with --overwrite"),
        ("checkpoint-2", "go on with --resume"),
    ):
        if made is not None:
            (tmp_path / made).mkdir()
        assert str(disk_error(full, tmp_path)).endswith(f"and {advice}")
