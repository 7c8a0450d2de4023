"""What `taopd check` computes and reads, counted: no forward and no file twice. And how libraries load."""

import gc

import pytest
from torch import nn

from taopd import TeachabilityConfig, cli
from taopd.cli import libraries
from taopd.errors import ConfigError
from taopd.models import loading, own_forward, prompts
from taopd.trainer import reference_student
from taopd.trainer.base import BaseTrainer
from taopd.trainer.build.looked_at import LookedAt
from tests.conftest import write_config


@pytest.fixture
def config(micro_lab, tmp_path):
    """The path of a config of the micro lab."""
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 1}
    return str(write_config(micro_lab, tmp_path, **settings))


@pytest.fixture
def count(monkeypatch):
    """Notes every call of a function in a list."""

    def count(owner, name, into, note):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            into.append(note(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return count


def test_each_model_runs_once_over_what_was_sampled(micro_lab, config, count, capsys):
    scored, own, read = [], [], []
    count(BaseTrainer, "forward_states", scored, lambda _, model, part: (id(model), len(part.rows)))
    count(own_forward, "_own_logprobs", own, lambda _, model, part, __: (id(model), len(part.rows)))
    count(loading.AutoTokenizer, "from_pretrained", read, str)
    assert cli.main(["check", config, "--json"]) in (0, 1)
    assert '"scoring path"' in capsys.readouterr().out
    # Each model over all four completions, and for the item "scoring path" over two rows, padded and alone.
    # One of the two once more alone, and once with other tokens in its later half.
    padded = [model for model, rows in scored if rows == own_forward.NUM_ROWS]
    whole = [model for model, rows in scored if rows == 4]
    assert len(scored) == 6 and len(padded) == len(set(padded)) == len(set(whole)) == 2
    assert len(own) == 2 * (own_forward.NUM_ROWS + 1) and all(rows == 1 for _, rows in own)
    assert sorted(read) == sorted(map(str, (micro_lab.student, micro_lab.teacher)))


@pytest.mark.parametrize("command", ["check", "train"])
def test_prompts_are_read_once_and_a_check_copies_no_weights(command, config, count, capsys):
    """A run has its copy of the student for method reach; what only looks has none."""
    read, copied = [], []
    count(prompts.datasets, "load_dataset", read, str)
    count(reference_student.copy, "deepcopy", copied, lambda each, *_: isinstance(each, nn.Module))
    argv = ["check", config, "--json"] if command == "check" else ["train", "--config", config]
    assert cli.main(argv) in (0, 1)
    assert '"kept tokens"' in capsys.readouterr().out or command == "train"
    assert len(read) == 1
    assert any(copied) == (command == "train")


def test_a_trainer_for_a_check_does_not_train(micro_lab, tmp_path):
    sizes = {"score_top_k": 4, "max_completion_length": 6}
    args = TeachabilityConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, **sizes)
    rows = prompts.load_prompts(micro_lab.prompts)
    trainer = LookedAt(str(micro_lab.student), str(micro_lab.teacher), args, train_dataset=rows)
    with pytest.raises(ConfigError, match="made for a check"):
        trainer.train()


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
