"""A prompt that does not fit a context: refused where the trainer is made, in Python as by the command.

Oracle: numbers of tokens, counted by words.
"""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM

from taopd import cli
from taopd.errors import DataError
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_tokenizer, write_config
from tests.e2e.test_trainer import CPU, OURS
from tests.e2e.test_training_set import Rows
from tests.scripted_server import ScriptedServer

SHORT = "3 + 4 ="
ROWS = 8


def words(count):
    return " ".join(["w1"] * count)


def rows_with(long, number=5, **columns):
    """Short prompts, and a long one in the middle."""
    rows = [
        {"prompt": SHORT} | {name: values[0] for name, values in columns.items()}
        for _ in range(ROWS)
    ]
    rows[number] = {"prompt": long} | {name: values[1] for name, values in columns.items()}
    return rows


@pytest.fixture(scope="module")
def short_teacher(tmp_path_factory):
    """A teacher whose context is half the student's, 32 tokens."""
    folder = tmp_path_factory.mktemp("short") / "teacher"
    model = make_model(seed=7, hidden_size=24, layers=1)
    model.config.max_position_embeddings = 32
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(micro_lab, tmp_path):
    def trainer(rows, teacher=None, **settings):
        return TeachabilityTrainer(
            model=str(micro_lab.student),
            teacher_model=teacher,
            args=TeachabilityConfig(
                output_dir=str(tmp_path / "run"),
                **CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 1} | settings,
            ),
            train_dataset=rows if not isinstance(rows, list) else Dataset.from_list(rows),
        )

    return trainer


def test_a_prompt_beyond_the_students_context_is_refused(make, micro_lab):
    """58 of 64 tokens leave room for a completion of 6; one more does not."""
    make(rows_with(words(58)), str(micro_lab.teacher))
    said = r"the prompt of row 5 of the training set has 59 tokens.*a context of 64 tokens.*room for 58"
    with pytest.raises(DataError, match=said):
        make(rows_with(words(59)), str(micro_lab.teacher))


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_so_it_is_in_rows_of_other_kinds(make, micro_lab, kind):
    rows = rows_with(words(59))
    given = IterableDataset.from_generator(lambda: iter(rows)) if kind == "stream" else Rows(rows)
    with pytest.raises(DataError, match="row 5 of the training set has 59 tokens"):
        make(given, str(micro_lab.teacher))


def test_a_prompt_beyond_the_teachers_context_is_refused(make, short_teacher):
    make(rows_with(words(26)), short_teacher)
    with pytest.raises(DataError, match=r"row 5 .*has 27 tokens.*a context of 32 tokens"):
        make(rows_with(words(27)), short_teacher)


def test_of_several_teachers_the_rows_own_counts(make, micro_lab, short_teacher):
    """A long prompt of the one whose context is long enough is none of the other's."""
    teachers = {"long": str(micro_lab.teacher), "short": short_teacher}
    make(rows_with(words(50), teacher=("short", "long")), teachers)
    with pytest.raises(DataError, match=r"row 5 .*has 27 tokens.*a context of 32 tokens"):
        make(rows_with(words(27), teacher=("long", "short")), teachers)


def test_a_teacher_prompt_beyond_the_teachers_context_is_refused(make, short_teacher):
    long = rows_with(SHORT, teacher_prompt=(SHORT, words(27)))
    with pytest.raises(
        DataError, match=r"the teacher's prompt of row 5 .*has 27 tokens.*of 32 tokens"
    ):
        make(long, short_teacher)
    # The student's own prompt is not read by this teacher.
    make(rows_with(words(40), teacher_prompt=(SHORT, SHORT)), short_teacher)


def test_a_servers_limit_counts_with_the_token_that_it_adds(make, micro_lab):
    model = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    with ScriptedServer(model) as server:
        usual = server.get
        served = {"data": [{"id": "tiny-teacher", "max_model_len": 20}]}
        server.get = lambda path: served if path == "/v1/models" else usual(path)
        settings = {"teacher_url": server.url, "loss": "sampled_reverse_kl"}
        make(rows_with(words(13)), **settings)
        with pytest.raises(DataError, match=r"row 5 .*has 14 tokens.*a context of 19 tokens"):
            make(rows_with(words(14)), **settings)


def test_the_evaluation_set_is_looked_at_too(micro_lab, tmp_path):
    args = TeachabilityConfig(output_dir=str(tmp_path), **CPU | OURS, per_device_train_batch_size=4)
    with pytest.raises(DataError, match="row 5 of the evaluation set has 59 tokens"):
        TeachabilityTrainer(
            model=str(micro_lab.student),
            teacher_model=str(micro_lab.teacher),
            args=args,
            train_dataset=Dataset.from_list(rows_with(SHORT)),
            eval_dataset=Dataset.from_list(rows_with(words(59))),
        )


def test_the_command_refuses_it_and_leaves_nothing(micro_lab, tmp_path, capsys):
    Dataset.from_list(rows_with(words(59))).to_parquet(str(tmp_path / "rows.parquet"))
    rows = {"dataset_name": str(tmp_path / "rows.parquet"), "per_device_train_batch_size": 4}
    path = write_config(micro_lab, tmp_path, **CPU | rows)
    argv = ["train", "--config", str(path), "--quiet", "--skip-check"]
    assert cli.main(argv) == 2
    assert "row 5 of the training set has 59 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert AutoConfig.from_pretrained(micro_lab.student).max_position_embeddings == 64
