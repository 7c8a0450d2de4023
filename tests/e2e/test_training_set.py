"""What a trainer makes of its training set: every kind of row, and sets that are too small.

Oracles: the prompts as written, read back from the run's rollouts, and the number of steps.
"""

import logging
import re
from collections import UserDict
from pathlib import Path
from types import MappingProxyType

import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback

from taopd.errors import DataError
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_rows, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS

TEMPLATE = (
    "{% if tools %}w9 {% endif %}{{ 'w8 ' if bold else '' }}"
    "{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}= {% endif %}"
)


def make_trainer(tmp_path, rows, teacher=None, eval_dataset=None, **settings):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 2, "log_rollouts": 4}
    return TeachabilityTrainer(
        make_model(seed=0),
        teacher or make_model(seed=1),
        TeachabilityConfig(output_dir=str(tmp_path / "run"), **(base | settings)),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


class Rows(TorchDataset):
    """A dataset of torch's kind."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("kind", [Dataset.from_list, Rows, stream])
def test_rows_reach_the_student_with_all_that_they_say(tmp_path, kind, unused):
    if unused and kind is Rows:
        pytest.skip("columns are a table's")
    rows = [
        {
            "prompt": user("1"),
            "tools": [{"name": "w1"}],
            "chat_template_kwargs": None,
            "images": None,
        },
        {
            "prompt": user("2"),
            "tools": None,
            "chat_template_kwargs": {"bold": True},
            "images": None,
        },
    ] * 2
    trainer = make_trainer(
        tmp_path, kind(rows), shuffle_dataset=False, remove_unused_columns=unused
    )
    seen = []
    trainer.observers.append(lambda scored: seen.extend(texts_of(trainer, scored.batch)))
    trainer.train()
    assert seen[:4] == ["w9 <bos> 1 =", "w8 <bos> 2 ="] * 2


def texts_of(trainer, batch):
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [trainer.text_tokenizer.decode(ids[mask.bool()]) for ids, mask in pairs]


def test_text_messages_and_conversations_train_in_one_batch(tmp_path):
    turns = [*user("1"), {"role": "assistant", "content": "2"}]
    rows = Rows(
        [{"prompt": "3 + 4 ="}, {"messages": turns}, {"prompt": user("5")}, {"prompt": "6"}]
    )
    trainer = make_trainer(tmp_path, rows, shuffle_dataset=False)
    seen = []
    trainer.observers.append(lambda scored: seen.extend(texts_of(trainer, scored.batch)))
    trainer.train()
    assert seen[:4] == ["3 + 4 =", "<bos> 1 =", "<bos> 5 =", "6"]


@pytest.mark.parametrize("kind", [Dataset.from_list, Rows])
def test_too_few_prompts_are_repeated_to_fill_a_batch(tmp_path, kind, caplog):
    with caplog.at_level(logging.WARNING, logger="taopd"):
        trainer = make_trainer(tmp_path, kind(make_rows(3, "train")), gradient_accumulation_steps=2)
    assert "has 3 prompts, one generation batch takes 8: prompts are repeated" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_group_of_completions_needs_one_prompt(tmp_path):
    rows = Dataset.from_list(make_rows(1, "train"))
    trainer = make_trainer(tmp_path, rows, num_generations=4)
    assert len(trainer.train_dataset) == 1
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            Dataset.from_list(make_rows(3, "x")),
            {"dataloader_drop_last": True},
            "has 3 .* takes 4: add",
        ),
        (stream(make_rows(3, "x")), {}, "has 3 prompts, one generation batch takes 4: add prompts"),
        (stream([]), {}, "has no prompts"),
        (Dataset.from_list([]), {}, "has no prompts"),
        (Rows([]), {}, "has no prompts"),
        (Dataset.from_list([{"question": "1"}] * 4), {}, "no 'prompt' column, only question"),
        (Dataset.from_list([{"prompt": user("1"), "images": ["x"]}] * 4), {}, "row 0 has images"),
    ],
)
def test_a_set_that_cannot_train_is_refused(tmp_path, rows, settings, message):
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, rows, **settings)


@pytest.mark.parametrize("rows", [stream([]), Dataset.from_list([]), Rows([])])
def test_an_evaluation_set_without_prompts_is_refused(tmp_path, rows):
    training = Dataset.from_list(make_rows(4, "x"))
    with pytest.raises(DataError, match="the evaluation set other has no prompts"):
        make_trainer(tmp_path, training, eval_dataset={"one": training, "other": rows})


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_teacher_prompts_are_read_from_rows_of_any_mapping(tmp_path, kind, caplog):
    """A student as its own teacher is refused where nothing else than its prompt is read."""
    rows = [{"prompt": "1 + 2 =", "teacher_prompt": "3 1 + 2 ="}] * 4
    trainer = make_trainer(
        tmp_path, Rows([kind(row) for row in rows]), "self", Rows([kind(row) for row in rows])
    )
    trainer.train()
    assert trainer.state.global_step == 2
    lacking = Rows([kind({"prompt": "1 + 2 ="})])
    with pytest.raises(DataError, match="the evaluation set has no column 'teacher_prompt'"):
        make_trainer(tmp_path, Rows([kind(row) for row in rows]), "self", lacking)


def test_one_row_with_a_teacher_prompt_is_enough(tmp_path):
    rows = [{"prompt": "1 + 2 ="}] * 3 + [{"prompt": "1 + 2 =", "teacher_prompt": "3 1 + 2 ="}]
    trainer = make_trainer(tmp_path, Rows(rows), "self", Rows(rows), shuffle_dataset=False)
    seen = []
    trainer.observers.append(lambda scored: seen.extend(scored.batch["teacher_prompt_mask"].sum(1)))
    trainer.train()
    assert seen[:4] == [4, 4, 4, 5]
    long = [*rows[:3], {"prompt": "1 + 2 =", "teacher_prompt": "3 " * 600}]
    with pytest.raises(
        DataError, match="the teacher's prompt of row 3 of the training set has 600"
    ):
        make_trainer(tmp_path, Rows(long))


def test_training_without_a_step_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, Dataset.from_list(make_rows(8, "x")))
    trainer.train_dataset = trainer.train_dataset.select(range(3))
    with pytest.raises(DataError, match="ended without a step"):
        trainer.train()


def test_a_callback_that_ends_a_run_before_its_first_step_is_not_the_prompts_fault(tmp_path):
    class Ends(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer(
        tmp_path, Dataset.from_list(make_rows(8, "x")), gradient_accumulation_steps=2
    )
    trainer.add_callback(Ends())
    with pytest.raises(DataError, match="or a callback stopped the run before its first step"):
        trainer.train(check=False)


def test_faults_of_the_prompts_are_said_without_the_check_too(tmp_path, caplog):
    rows = [{"prompt": f"1 + {n} = <eos>"} for n in range(4)]
    with caplog.at_level(logging.WARNING, logger="taopd"):
        make_trainer(tmp_path, Dataset.from_list(rows))
    assert "4 of 4 prompts do not end where the assistant begins" in caplog.text


ONE = {"prompt": "w1 w2"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("prompts.parquet", " is a str, no dataset: taopd.load_prompts reads"),
        (Path("prompts.parquet"), "Path, no dataset: taopd.load_prompts reads"),
        (3, " is a int, no dataset"),
        ({"prompt": ["w1"]}, " is a dict, no dataset"),
        (DatasetDict(train=Dataset.from_list([ONE])), "take one split of it: 'train'"),
        (pandas.DataFrame([ONE]), " is a DataFrame, which gives no rows"),
        (["w1 w2"], ": row 0 is a str; a row is a mapping with 'prompt'"),
        ([{"text": "w1"}], " has no 'prompt' column, only text"),
    ],
)
def test_what_is_no_set_of_prompts_is_named_before_training(tmp_path, rows, told):
    """The evaluation set too, which is read in the middle of a run."""
    with pytest.raises(DataError, match=f"^the training set.*{re.escape(told)}"):
        make_trainer(tmp_path, rows)
    sets = {"dev": Dataset.from_list([ONE] * 4), "test": rows}
    with pytest.raises(DataError, match=f"^the evaluation set test.*{re.escape(told)}"):
        make_trainer(tmp_path, Dataset.from_list([ONE] * 4), eval_dataset=sets)


def test_training_without_prompts_is_refused_where_it_begins(tmp_path):
    trainer = make_trainer(tmp_path, None)
    with pytest.raises(DataError, match="no prompts to train on: pass train_dataset"):
        trainer.train()
