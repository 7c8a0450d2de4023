"""Run folders. Oracle: the file system before and after."""

import json
import math
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from taopd import cli
from taopd.errors import ConfigError, DataError
from taopd.runs import lock
from taopd.runs.checkpoints import SEAL
from taopd.runs.folder import MARKER, RunFolder
from taopd.runs.jsonl import (
    append_jsonl,
    cut_lines,
    read_jsonl,
    rewind_jsonl,
    write_json,
    write_jsonl,
)
from taopd.runs.lock import hold
from taopd.trainer.environment import environment
from tests.conftest import make_checkpoint


def names(folder):
    return {found.name for found in folder.iterdir()}


def test_create_makes_a_marked_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert names(folder.path) == {MARKER}
    assert folder.path.is_absolute()


@pytest.mark.parametrize(
    "evidence", ["config.json", "metrics.jsonl", "results.json", "checkpoint-5"]
)
def test_a_folder_with_a_run_is_refused_and_left_alone(tmp_path, evidence):
    RunFolder.create(tmp_path)
    (tmp_path / evidence).mkdir() if "-" in evidence else (tmp_path / evidence).write_text("{}")
    before = names(tmp_path)
    with pytest.raises(
        DataError, match=rf"holds another run \({evidence}\).*--resume.*--overwrite"
    ):
        RunFolder.check(tmp_path, command="train")
    with pytest.raises(DataError, match="choose another output folder, or start anew"):
        RunFolder.create(tmp_path)
    assert names(tmp_path) == before
    assert RunFolder.create(tmp_path, resume=True).path == tmp_path
    assert names(tmp_path) == before
    RunFolder.create(tmp_path, overwrite=True)
    assert names(tmp_path) == {MARKER}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    "name",
    [
        "model",
        "env.json",
        "warnings.jsonl",
        "selection",
        "verdicts.json",
        "tokens.parquet",
        "steps.parquet",
    ],
)
def test_what_a_run_would_replace_is_never_taken_from_others(tmp_path, name, flags):
    """A folder of the user's with a model in `model/`, say, which a run writes at its end; or of diagnose."""
    path = tmp_path / name
    if "." in name:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match=rf"holds {name} that no taopd run wrote"):
        RunFolder.create(tmp_path, **flags)
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("demo", "arms"),
        ("demo", "accuracy.png"),
        ("demo", "summary.md"),
        ("demo --real", "timings.json"),
        ("demo --real", "arms"),
    ],
)
def test_nor_what_one_command_alone_would_replace(tmp_path, capsys, command, name, flags):
    (tmp_path / name).write_text("mine")
    assert cli.main([*command.split(), "--output", str(tmp_path), *flags]) == 2
    assert f"holds {name} that no taopd run wrote" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "mine"}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_is_claimed_only_if_the_look_before_would_have_passed(tmp_path, flags):
    (tmp_path / "arms").mkdir()
    for look in (RunFolder.check, RunFolder.create):
        with pytest.raises(DataError, match="holds arms that no taopd run wrote"):
            look(tmp_path, also_owns=["arms"], **flags)
    assert names(tmp_path) == {"arms"}


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_model_folder_is_never_taken_for_a_run(tmp_path, micro_lab, flags):
    before = {p.name: p.read_bytes() for p in micro_lab.student.iterdir()}
    with pytest.raises(DataError, match=r"config\.json that no taopd run wrote"):
        RunFolder.create(micro_lab.student, **flags)
    assert {p.name: p.read_bytes() for p in micro_lab.student.iterdir()} == before


def test_overwrite_leaves_foreign_files_and_says_so(tmp_path, caplog):
    RunFolder.create(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "arms").mkdir()
    (tmp_path / "selection").mkdir()
    (tmp_path / "selection" / "0.parquet").write_text("x")
    RunFolder.create(tmp_path, overwrite=True, also_owns=["arms"])
    assert names(tmp_path) == {MARKER, "notes.txt"}
    assert "left in place" in caplog.text and "notes.txt" in caplog.text


def test_overwrite_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    RunFolder.create(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{}")
    (tmp_path / "run" / "selection").symlink_to(outside)
    RunFolder.create(tmp_path / "run", overwrite=True)
    assert names(tmp_path / "run") == {MARKER} and (outside / "precious").exists()


@pytest.mark.parametrize(
    ("read", "kept"),
    [
        ("model", True),
        ("model/x.safetensors", True),
        (".", True),
        ("linked", True),
        ("checkpoint-5", True),
        ("arms/a/model", True),
        ("prompts.parquet", False),
        ("../outside", False),
        ("org/name-on-the-hub", False),
    ],
)
def test_overwrite_never_removes_what_is_read(tmp_path, read, kept):
    """Oracle: what is there afterwards. Foreign files stay by themselves, so they may be read."""
    run = RunFolder.create(tmp_path / "run").path
    for name in ("model", "checkpoint-5", "arms/a/model", "../outside"):
        (run / name).mkdir(parents=True)
    (run / "model" / "x.safetensors").touch()
    (run / "linked").symlink_to("model")
    (run / "prompts.parquet").touch()
    before = set(run.rglob("*"))
    reads = (None, object(), str(run / read))
    if kept:
        with pytest.raises(
            DataError, match=r"which is read here and which --overwrite would remove"
        ):
            RunFolder.check(run, overwrite=True, also_owns=["arms"], reads=reads)
    else:
        RunFolder.check(run, overwrite=True, also_owns=["arms"], reads=reads)
    assert set(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "run_config.json"])
def test_a_run_of_another_command_is_not_resumed(tmp_path, name):
    RunFolder.create(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text('{"command": "train"}')
    with pytest.raises(DataError, match="holds a run of `taopd train`, which this command cannot"):
        RunFolder.check(tmp_path, command="demo", resume=True)
    for mine in ('{"command": "demo"}', "{}", "[]", "cut"):
        (tmp_path / name).write_text(mine)
        assert RunFolder.check(tmp_path, command="demo", resume=True) == tmp_path


def test_any_readme_of_the_users_stays(tmp_path):
    RunFolder.create(tmp_path)
    (tmp_path / "results.json").touch()
    (tmp_path / "README.md").write_bytes(b"\xff\xfe mine")
    RunFolder.create(tmp_path, overwrite=True)
    assert names(tmp_path) == {MARKER, "README.md"}


def test_bad_targets(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write"):
        RunFolder.create(tmp_path / "file" / "below")
    for place in (tmp_path / "file" / "below", Path("/proc/taopd/run")):
        with pytest.raises(DataError, match=r"cannot write to '/.*: No\w* "):
            RunFolder.check(place)  # Before the hours that come first are spent.
    RunFolder.check(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="exclude each other"):
        RunFolder.create(tmp_path / "x", resume=True, overwrite=True)
    assert names(tmp_path) == {"file"}


def test_newest_checkpoint_is_by_number_and_whole(tmp_path, caplog):
    folder = RunFolder.create(tmp_path)
    assert folder.newest_checkpoint() is None
    for step in (9, 10, 11):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11" / SEAL).unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert folder.newest_checkpoint() == tmp_path / "checkpoint-10"
    assert "checkpoint-11 is passed over: it has no taopd.json" in caplog.text


def test_resume_clears_away_what_a_kill_left(tmp_path):
    RunFolder.create(tmp_path)
    for name in (".checkpoint-partial", ".model-partial", ".checkpoint-4-old"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.x1.tmp").write_text("half")
    (tmp_path / "metrics.jsonl").write_text("")
    RunFolder.create(tmp_path, resume=True)
    assert names(tmp_path) == {MARKER, "metrics.jsonl"}


def test_write_json_is_plain_json_with_null_for_non_finite(tmp_path):
    path = tmp_path / "x.json"
    values = {
        "nan": math.nan,
        "inf": [math.inf, np.float32("nan"), torch.tensor(math.inf)],
        "numpy": np.arange(2),
        "path": tmp_path,
        3: {2, 1},
        "dtype": torch.float32,
    }
    write_json(path, values)
    assert json.loads(path.read_text()) == {
        "nan": None,
        "inf": [None, None, None],
        "numpy": [0, 1],
        "path": str(tmp_path),
        "3": [1, 2],
        "dtype": "torch.float32",
    }


def test_write_json_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o044 or os.umask(os.umask(0)) & 0o044

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == {"x.json"}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_a_log_is_cut_at_newlines_alone(tmp_path, character):
    """Completions hold characters that `str.splitlines` takes for the end of a line."""
    documents = [{"step": step, "text": f"a{character}b"} for step in range(4)]
    for cut in (lambda path: rewind_jsonl(path, 2), lambda path: cut_lines(path, 2)):
        path = tmp_path / "x.jsonl"
        write_jsonl(path, documents)
        cut(path)
        append_jsonl(path, documents[2])
        assert read_jsonl(path) == documents[:3]


def test_a_line_torn_within_a_character_is_left_out_and_no_other(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"step": 1, "text": "\u00e9"}])
    whole = path.read_bytes()
    torn = whole[: whole.index("\u00e9".encode()) + 1]
    path.write_bytes(whole + torn)
    assert read_jsonl(path) == [{"step": 1, "text": "\u00e9"}]
    rewind_jsonl(path, 2)
    assert path.read_bytes() == whole
    path.write_bytes(torn + b"\n" + whole)
    with pytest.raises(DataError, match="is no text"):
        read_jsonl(path)


def test_jsonl_round_trip_and_torn_last_line(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}, {"a": math.nan}])
    append_jsonl(path, {"a": "line\nbreak \u2028"})
    assert read_jsonl(path) == [{"a": 1}, {"a": None}, {"a": "line\nbreak \u2028"}]
    with open(path, "a") as stream:
        stream.write('{"a": ')
    assert len(read_jsonl(path)) == 3
    append_jsonl(path, {})
    append_jsonl(path, {})
    with pytest.raises(DataError, match="line 4: not JSON"):
        read_jsonl(path)
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl(tmp_path / "none")


def test_environment_has_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_from_environment")
    monkeypatch.setattr(
        sys,
        "argv",
        ["taopd", "--hub_token", "hf_1", "--api-key=hf_2", "--hub_token", "--max_new_tokens"],
    )
    recorded = environment(seed=3)
    text = json.dumps(recorded)
    assert not any(secret in text for secret in ("hf_1", "hf_2", "hf_from_environment"))
    assert recorded["argv"][:4] == ["taopd", "--hub_token", "***", "--api-key=***"]
    assert recorded["argv"][-1] == "--max_new_tokens"
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["seeds"] == {"seed": 3} and recorded["devices"]


HOLDER = """
import sys, time
from pathlib import Path
from taopd.runs.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_living_holder_is_named_and_a_dead_ones_lock_is_taken_over(tmp_path, caplog):
    RunFolder.create(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        who = f"process {child.pid} on {socket.gethostname()}, since 20"
        for claim in (lambda: hold(tmp_path).__enter__(), lambda: RunFolder.check(tmp_path)):
            with pytest.raises(DataError, match=who):
                claim()
        before = names(tmp_path)
        with pytest.raises(DataError, match="in use by"):
            RunFolder.create(tmp_path, overwrite=True)
        assert names(tmp_path) == before
    finally:
        child.kill()
        child.communicate()
    with hold(tmp_path), hold(tmp_path):
        assert f"process {child.pid}" in caplog.text and "taken over" in caplog.text
        assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == os.getpid()
        RunFolder.check(tmp_path)
    assert not (tmp_path / lock.HOLDER).exists()
    caplog.clear()
    with hold(tmp_path):
        assert caplog.text == ""


def test_processes_that_only_look_do_not_take_each_other_for_the_holder(tmp_path):
    """The processes of one run check its folder at the same time."""
    (tmp_path / lock.LOCK).touch()
    code = (
        "import sys, time; from pathlib import Path; from taopd.runs.lock import refuse_if_held\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(2000): refuse_if_held(Path(sys.argv[1]))"
    )
    lookers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for looker in lookers:
        assert looker.stdout is not None and looker.stdout.readline() == "ready\n"
    for looker in lookers:
        assert looker.stdin is not None
        looker.stdin.write("\n")
        looker.stdin.flush()
    told = [looker.communicate()[1] for looker in lookers]
    assert [looker.returncode for looker in lookers] == [0, 0], told


def test_a_name_that_is_no_text_in_this_locale_is_written_and_read_again(tmp_path):
    """Python gives such bytes of a command line as halves of surrogate pairs, which UTF-8 does not have."""
    name = os.fsdecode(b"l\xe4uf")
    write_json(tmp_path / "config.json", {"output_dir": name})
    assert json.loads((tmp_path / "config.json").read_text())["output_dir"] == name
    # A model card of transformers would fail at the first checkpoint.
    with pytest.raises(DataError, match=r"no text in this locale.*LC_ALL=C\.UTF-8"):
        RunFolder.check(tmp_path / name)
