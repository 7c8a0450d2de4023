"""Messages as a stranger reads them: no names from inside the program. Oracle: `tests.wording`."""

import dataclasses

import pytest

from taopd.experiments.study.file import StudyFile
from taopd.trainer.cost import PlanSettings
from taopd.trainer.settings_file import known_names
from tests.wording import bare_numbers, inside_names, templates

OF_COMMANDS = {
    # flags of evaluate and diagnose, and the arguments of the same names in Python
    *("batch_size", "max_new_tokens", "max_tokens", "num_samples", "num_completions", "num_draws"),
    *("num_resamples", "head_dim", "build_lab", "teacher_model", "processing_class", "peft_config"),
    *("train_dataset", "eval_dataset"),
    # columns of a prompt set and of a token table
    *("teacher_prompt", "disagreement_k"),
}
OF_SETTINGS = {  # values
    *("forward_kl", "reverse_kl", "token_mean", "topk_lists", "self_ema", "adamw_torch"),
    *("flash_attention_2", "update_norm"),
}
OF_FILES = {  # keys of a model's or tokenizer's JSON, and of settings that are mappings
    *("attention_dropout", "base_model", "chat_template", "eos_token", "pad_token", "vocab_size"),
    *("gguf_file", "fsdp_version", "num_beams", "prompt_lookup_num_tokens", "use_reentrant"),
    *("quantization_config", "num_processes", "dispatch_batches"),
    *("every_n_layers", "disable_compile"),
}
OF_LIBRARIES = {
    *("merge_and_unload", "name_or_path", "requires_grad", "attn_pdrop"),
    *("eos_token_id", "generation_config", "stop_strings", "init_lora_weights"),
    "layer_replication",
}
"""What a user is told to call or to set on a model of PyTorch, transformers or PEFT."""


@pytest.fixture(scope="module")
def said():
    return list(templates())


def known() -> frozenset[str]:
    fields = [each.name for kind in (StudyFile, PlanSettings) for each in dataclasses.fields(kind)]
    return frozenset(
        {*known_names(), *fields, *OF_COMMANDS, *OF_SETTINGS, *OF_FILES, *OF_LIBRARIES}
    )


def test_no_message_has_a_name_from_inside(said):
    names = known()
    found = {place: words for place, text in said if (words := inside_names(text, names))}
    assert not found, found
    assert len(said) > 500


def test_every_name_that_is_let_through_is_still_said(said):
    """So that the lists above do not outlive their messages."""
    words = {word for _, text in said for word in inside_names(text, frozenset())}
    listed = OF_COMMANDS | OF_SETTINGS | OF_FILES | OF_LIBRARIES
    assert listed <= words, listed - words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("logits by impl: chunked", ["impl", "chunked"]),
        ("the _noise_floor of keep_rows is wrong", ["_noise_floor", "keep_rows"]),
        ("set score_top_k, or --max_steps 5", []),
        ("expected NoneType", ["NoneType"]),
    ],
)
def test_the_rule_finds_what_it_should(text, found):
    assert inside_names(text, known()) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mean 3.5, largest 14 nats over 288 tokens", []),
        ("a drift of 0.24 (limit 0.1)", ["0.24"]),
        ("peak 3,171 of 24,106 MiB, phase 3", ["3"]),
        ("id 7 is 'x3', row 3 has <eos> (46)", []),
        ("95.5 % of the teacher's top 4 tokens", []),
    ],
)
def test_numbers_need_a_unit(text, found):
    assert bare_numbers(text) == found
