"""The head of the student before training, whatever of it trains. Oracle: the head as it was, kept apart."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

from taopd.models.forward import bare
from taopd.models.output_head import read_head
from taopd.trainer.reference_student import ReferenceStudent
from tests.conftest import make_model

VOCAB = 40


def phi():
    """A model whose head has a bias."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return PhiForCausalLM(PhiConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes))


CASES = {
    "nothing": (lambda: make_model(seed=0, vocab_size=VOCAB), {}),
    "tokens of a tied head": (
        lambda: make_model(seed=0, vocab_size=VOCAB, tie_word_embeddings=True),
        {"trainable_token_indices": [3, 5]},
    ),
    "tokens of the head": (
        lambda: make_model(seed=0, vocab_size=VOCAB),
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3, 5]}},
    ),
    "the bias": (phi, {"bias": "all"}),
    "weight and bias": (phi, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_head_of_the_start_stays_what_it_was(name):
    make, options = CASES[name]
    student = get_peft_model(make(), LoraConfig(target_modules=["q_proj"], **options))
    reference = ReferenceStudent(student, Accelerator(cpu=True))
    start = read_head(bare(student), VOCAB)
    weight, bias = (
        None if each is None else each.detach().clone() for each in (start.weight, start.bias)
    )

    def head_of(model):
        return read_head(bare(model), VOCAB)

    with torch.no_grad():
        for step in range(2):
            for each in student.parameters():
                if each.requires_grad:
                    each.add_(torch.randn_like(each))
            found, now = reference.head(head_of, student), head_of(student)
            assert torch.equal(found.weight, weight), step
            moved = not torch.equal(now.weight, weight)
            if bias is not None:
                assert torch.equal(found.bias, bias), step
                moved |= not torch.equal(now.bias, bias)
            assert moved == (name != "nothing"), "vacuous"
