"""Inputs that once ended in an error from the libraries below, or in a check that broke."""

import logging

import pytest
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trainer import CPU

from taopd.errors import ConfigError
from taopd.models.loading import load_model
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_rows, make_tokenizer


def make_trainer(tmp_path, student=None, teacher=None, rows=None, eval_rows=None, **settings):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return TeachabilityTrainer(
        student or make_model(seed=0),
        teacher or make_model(seed=1),
        TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU | {"max_steps": 1} | settings),
        train_dataset=Dataset.from_list(rows or make_rows(8, "train")),
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )


def bart():
    """A small model with an encoder and a decoder."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    config = transformers.BartConfig(vocab_size=40, d_model=8, **sizes, **heads)
    return transformers.BartForConditionalGeneration(config)


def test_the_check_reads_prompts_that_end_a_conversation(tmp_path):
    """Without a column `prompt`; the same answer as with one."""
    turns = [{"role": "user", "content": "3 + 4 ="}, {"role": "assistant", "content": "7"}]
    found = {
        name: make_trainer(tmp_path / name, rows=[{name: value}] * 8).check()
        for name, value in {"messages": turns, "prompt": turns[:1]}.items()
    }
    (one, other) = (
        next(each for each in items if each.item == "prompts") for items in found.values()
    )
    assert "broke" not in one.measured and (one.level, one.advice) == (other.level, other.advice)


def test_a_model_in_float64_trains(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=0).double(), make_model(seed=1).double())
    trainer.train()
    assert trainer.state.log_history[0]["update/norm"] > 0


def test_an_encoder_and_a_decoder_are_refused(tmp_path):
    words = r"is an encoder and a decoder \(bart\): choose a causal language model"
    with pytest.raises(ConfigError, match=f"the student {words}"):
        make_trainer(tmp_path, bart())
    bart().save_pretrained(tmp_path / "bart")
    with pytest.raises(ConfigError, match=words):
        load_model(tmp_path / "bart")


def test_a_run_without_a_limit_of_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_completion_length=None: without a limit"):
        make_trainer(tmp_path, max_completion_length=None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optim": "grokadamw"}, "^optim='grokadamw': Please install"),
        ({"optim": "adafactor", "optim_args": "lr"}, "^optim='adafactor', optim_args='lr': "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "^lr_scheduler_type='warm.*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "^lr_scheduler_type='cosine_.*min_lr"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"foo": 1}},
            "^lr_scheduler_.*lr_scheduler_kwargs={'foo': 1}.*'foo'",
        ),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made_is_named(settings, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        make_trainer(tmp_path, **settings).train(check=False)


@pytest.mark.parametrize("several", [False, True])
def test_a_best_metric_that_no_evaluation_gives_ends_the_run_with_its_steps_saved(
    several, tmp_path
):
    rows = Dataset.from_list(make_rows(4, "test"))
    each_step = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    each_step |= {"eval_rows": {"a": rows, "b": rows} if several else rows, "max_steps": 2}
    trainer = make_trainer(tmp_path, **each_step, metric_for_best_model="accuracy")
    losses = "eval_a_loss or eval_b_loss" if several else "eval_loss"
    told = rf"'accuracy' is no metric of the evaluation; take {losses}\. 1 steps are saved in"
    with pytest.raises(ConfigError, match=told):
        trainer.train(check=False)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True.* text"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics: .*metric of your own"),
    ],
)
def test_a_setting_that_no_batch_of_prompts_can_meet_is_refused(settings, told, tmp_path):
    """Both were a TypeError, the second after the first evaluation."""
    with pytest.raises(ConfigError, match=told):
        make_trainer(tmp_path, **settings)


def test_an_adapter_of_a_model_without_a_name_is_not_one_of_none(tmp_path, caplog):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    with caplog.at_level(logging.WARNING, logger="taopd"):
        make_trainer(tmp_path, get_peft_model(make_model(seed=0), config))
    assert "the student is an adapter of an unnamed model: this adapter" in caplog.text


def test_an_evaluation_before_the_first_step_needs_prompts(tmp_path):
    with pytest.raises(ConfigError, match=r"eval_on_start=True.* pass eval_dataset"):
        make_trainer(tmp_path, eval_on_start=True)
