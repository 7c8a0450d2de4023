"""What `taopd check` computes and reads, counted: no forward and no file twice. And how libraries load."""

import gc

import pytest
import yaml

from taopd import cli
from taopd.cli import libraries
from taopd.models import loading, own_forward
from taopd.trainer.base import BaseTrainer


def test_each_model_runs_once_over_what_was_sampled(micro_lab, tmp_path, monkeypatch, capsys):
    settings = {
        "model_name_or_path": str(micro_lab.student),
        "teacher_model_name_or_path": str(micro_lab.teacher),
        "dataset_name": str(micro_lab.prompts),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    scored, own, read = [], [], []

    def count(owner, name, into, note):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            into.append(note(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(BaseTrainer, "forward_states", scored, lambda _, model, part: (id(model), len(part.rows)))
    count(own_forward, "_own_logprobs", own, lambda _, model, part, __: (id(model), len(part.rows)))
    count(loading.AutoTokenizer, "from_pretrained", read, str)
    assert cli.main(["check", str(path), "--json"]) in (0, 1)
    assert '"scoring path"' in capsys.readouterr().out
    # Each model over all four completions, and over two rows alone for the item "scoring path".
    assert len(scored) == len(dict(scored)) == 2 and all(rows == 4 for _, rows in scored)
    assert len(own) == 2 * own_forward.NUM_ROWS and all(rows == 1 for _, rows in own)
    assert sorted(read) == sorted(map(str, (micro_lab.student, micro_lab.teacher)))


def test_libraries_load_without_a_search_for_garbage(monkeypatch):
    with libraries.while_loading():
        assert gc.isenabled(), "they are loaded already, and this process has garbage of its own"
    frozen = gc.get_freeze_count()
    monkeypatch.setattr(libraries, "HEAVY", ("no_such_library",))
    try:
        with pytest.raises(ImportError), libraries.while_loading():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
