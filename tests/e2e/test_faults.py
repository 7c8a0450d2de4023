"""Faults injected for real: a full disk, a folder that takes no more, memory that runs out, SIGKILL.

Oracle: one message, no torn file, and a resumed run that ends to the bit as the one without a fault.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_weights
from test_trainer import make_trainer, weights_of

from taopd import cli
from taopd.errors import ConfigError, DataError, ResourceError
from taopd.runs.checkpoints import checkpoints, why_incomplete
from taopd.runs.jsonl import append_jsonl
from taopd.runs.lock import lock_of
from taopd.trainer.checkpoint.state_file import load_tree, save_tree
from tests.conftest import write_config

SAVED = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "budget": 0.3}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(micro_lab, tmp_path_factory):
    """Weights of the run without a fault."""
    trainer = make_trainer(micro_lab, tmp_path_factory.mktemp("clean"), **SAVED, max_steps=4)
    trainer.train()
    return weights_of(trainer)


def assert_whole(run):
    """Nothing half-written: checkpoints are whole, every line of every log is JSON, no partial folder."""
    assert all(why_incomplete(path) is None for path in checkpoints(run))
    for path in run.glob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
        assert path.read_text().endswith("\n")
    assert not [path.name for path in run.iterdir() if path.name.startswith(".checkpoint")]


def finish(micro_lab, tmp_path, clean):
    resumed = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, clean)


@pytest.fixture
def file_size_limit():
    """Sets the largest file this process may write: the kernel then refuses the write itself (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [4096, 20_000, 40_000], ids=["model", "optimizer", "later"])
def test_a_checkpoint_that_cannot_be_written(micro_lab, tmp_path, clean, file_size_limit, limit):
    """model.safetensors has 29 kB, optimizer.safetensors 60 kB."""
    trainer = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=4, log_rollouts=0)
    save = trainer._save_checkpoint

    def on_a_full_disk(model, trial):
        if trainer.state.global_step == 3:
            file_size_limit(limit)
        save(model, trial)

    trainer._save_checkpoint = on_a_full_disk
    with pytest.raises(
        ResourceError, match=r"cannot write .*The newest checkpoint is .*point-2: go"
    ):
        trainer.train()
    file_size_limit(resource.RLIM_INFINITY)
    assert_whole(tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    finish(micro_lab, tmp_path, clean)


def test_a_log_that_cannot_be_written_has_no_torn_line(micro_lab, tmp_path, clean, file_size_limit):
    trainer = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=4, log_rollouts=0)
    log, run = trainer.log, tmp_path / "run"

    def on_a_full_disk(*args, **kwargs):
        if trainer.state.global_step == 3:
            file_size_limit((run / "metrics.jsonl").stat().st_size + 100)
        log(*args, **kwargs)

    trainer.log = on_a_full_disk
    with pytest.raises(ResourceError, match=r"step \d: cannot write"):
        trainer.train()
    file_size_limit(resource.RLIM_INFINITY)
    assert_whole(run)
    finish(micro_lab, tmp_path, clean)


def test_append_takes_back_what_does_not_fit(tmp_path, file_size_limit):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    before = path.read_bytes()
    file_size_limit(len(before) + 10)
    with pytest.raises(OSError, match="File too large"):
        append_jsonl(path, {"step": 2, "text": "x" * 100})
    file_size_limit(resource.RLIM_INFINITY)
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.access("/proc/mounts", os.R_OK), reason="no mounts here")
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_is_full_or_read_only(micro_lab, tmp_path, clean, kind):
    """A tmpfs of 300 kB, or one remounted read-only after two steps; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "300k" if kind == "full" else "8m"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        trainer = make_trainer(micro_lab, disk, **SAVED, max_steps=4)
        save = trainer._save_checkpoint

        def then_read_only(model, trial):
            save(model, trial)
            if kind == "read-only" and trainer.state.global_step == 2:
                # A file open for writing, as the lock is, forbids the remount; a failing disk does not ask.
                lock_of(disk / "run").release(force=True)
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        trainer._save_checkpoint = then_read_only
        reason = os.strerror(errno.ENOSPC if kind == "full" else errno.EROFS)
        with pytest.raises(ResourceError, match=reason) as caught:
            trainer.train()
        assert_whole(disk / "run")
        done = len(checkpoints(disk / "run"))
        assert 1 <= done <= 2 and f"checkpoint-{done}: go on with trainer" in str(caught.value)
        subprocess.run(["mount", "-o", "remount,rw,size=8m", str(disk)], check=True)
        finish(micro_lab, disk, clean)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def out_of_gpu_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_cpu_memory(*_):
    torch.empty(2**46, dtype=torch.uint8)  # 64 TiB: the allocator itself refuses


@pytest.mark.parametrize("fail", [out_of_gpu_memory, out_of_cpu_memory])
@pytest.mark.parametrize("where", ["sampling", "backward"])
def test_out_of_memory_in_a_step_saves_the_steps_before(micro_lab, tmp_path, clean, fail, where):
    settings = SAVED | {"save_steps": 100, "max_steps": 4}
    trainer = make_trainer(micro_lab, tmp_path, **settings)

    def at_step_two(value):
        if trainer.state.global_step == 2:
            fail()
        return value

    if where == "backward":
        trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(at_step_two)
    else:
        sample = trainer._generate_single_turn
        trainer._generate_single_turn = lambda *args, **kw: at_step_two(sample(*args, **kw))
    with pytest.raises(ResourceError, match="out of memory in step 3") as caught:
        trainer.train()
    text = str(caught.value)
    assert "lower per_device_train_batch_size" in text and "2 steps are saved in" in text
    assert_whole(tmp_path / "run")
    finish(micro_lab, tmp_path, clean)


def test_no_run_is_said_to_go_on_from_a_checkpoint_of_the_model_alone(micro_lab, tmp_path):
    settings = SAVED | {"save_only_model": True, "max_steps": 3}
    trainer = make_trainer(micro_lab, tmp_path, **settings)
    sample = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args, **kw: (
        out_of_cpu_memory() if trainer.state.global_step == 2 else sample(*args, **kw)
    )
    told = r"The student of 2 steps is in .*checkpoint-2, .*\(save_only_model\): start again"
    with pytest.raises(ResourceError, match=told):
        trainer.train()
    again = make_trainer(micro_lab, tmp_path, **settings)
    with pytest.raises(DataError, match="it holds the model alone"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"'restore' needs whole checkpoints: .*save_only_model"):
        make_trainer(micro_lab, tmp_path, **settings, collapse_guard="restore")


def test_out_of_memory_within_the_update_saves_nothing(micro_lab, tmp_path, clean):
    """Half of the weights may have moved: the checkpoint before is the state to go on from."""
    trainer = make_trainer(micro_lab, tmp_path, **SAVED, max_steps=4)
    create = trainer.create_optimizer

    def spoiled():
        optimizer = create()
        optimizer.register_step_post_hook(
            lambda *_: out_of_gpu_memory() if trainer.state.global_step == 2 else None
        )
        return optimizer

    trainer.create_optimizer = spoiled
    with pytest.raises(ResourceError, match=r"The newest checkpoint is .*checkpoint-2: go on"):
        trainer.train()
    before = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    finish(micro_lab, tmp_path, clean)


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def config(micro_lab, tmp_path):
    """A config file of a run of two steps."""
    sizes = {"max_steps": 2, "save_steps": 1, "score_top_k": 4, "max_completion_length": 6}
    path = write_config(micro_lab, tmp_path, **sizes, disable_tqdm=True)
    return ["train", "--config", str(path), "--skip-check", "--quiet"]


def test_a_run_killed_before_its_student_was_saved_is_finished(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(config) == 0
    student = load_file(run / "model/model.safetensors")
    for path in (run / "model").iterdir():
        path.unlink()
    (run / "model").rmdir()
    (run / "results.json").unlink()
    assert cli.main([*config, "--resume"]) == 0
    again = load_file(run / "model/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in student.items())
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert cli.main([*config, "--resume"]) == 0
    assert "has done its 2 steps" in capsys.readouterr().out


def test_a_student_that_cannot_be_written_is_one_message(
    config, tmp_path, capsys, file_size_limit, monkeypatch
):
    from taopd.trainer.checkpoint import resume as train_resume

    save = train_resume.save_student

    def on_a_full_disk(trainer, path):
        file_size_limit(4096)
        save(trainer, path)

    monkeypatch.setattr(train_resume, "save_student", on_a_full_disk)
    assert cli.main(config) == 2
    file_size_limit(resource.RLIM_INFINITY)
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert "cannot write" in line and "go on with --resume" in line
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert cli.main([*config, "--resume"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_an_output_folder_below_a_file_is_refused_before_anything_runs(config, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert cli.main([*config, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "file/run': Not a directory" in capsys.readouterr().err


def test_three_kills_change_nothing(tmp_path):
    """SIGKILL while saving, within a step, while the student is written; the script compares the folders."""
    command = [sys.executable, "-m", "scripts.reliability.kill_runs", "--kills", "3", "--seed", "5"]
    save = ["--steps", "6", "--save", str(tmp_path / "kills.json")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [*command, *save],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["num_kills"] == 3 and result["identical"] and result["broken"] == 0


# -- state files ----------------------------------------------------------------------------------


def test_a_tree_comes_back_equal_and_other_things_are_refused(tmp_path):
    """Oracle: the tree itself, types included."""
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "views": [base[1], base.T, base],
        3: (1, -(2**70), 0.1, None, True, "text \u2028", {"": []}),
        "odd": [float("inf"), torch.tensor(2, dtype=torch.uint8), torch.zeros(0, 3).bfloat16()],
    }
    save_tree(tmp_path / "tree", tree)
    found = load_tree(tmp_path / "tree")
    assert found[3] == tree[3] and type(found[3]) is tuple and found["odd"][0] == tree["odd"][0]
    pairs = [*zip(found["views"], tree["views"], strict=True)]
    pairs += [*zip(found["odd"][1:], tree["odd"][1:], strict=True)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    with pytest.raises(DataError, match="without pickle: /state/0 is a object"):
        save_tree(tmp_path / "x", {"state": [object()]})
    for content in (b"", b"\x80\x04.", (tmp_path / "tree").read_bytes()[:40]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DataError, match="is not a state file that taopd wrote"):
            load_tree(tmp_path / "bad")
