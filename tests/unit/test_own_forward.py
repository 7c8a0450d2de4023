"""What is read of a model against the model's own forward. Oracle: transformers' logits on unpadded rows."""

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from taopd.errors import ConfigError, DataError
from taopd.models.batch import Rollouts
from taopd.models.forward import backbone_forward
from taopd.models.output_head import read_head, require_backbone
from taopd.models.own_forward import BOUND, compare_with_own_forward, require_agreement
from taopd.teachers import LocalTeacher, load_teacher
from tests.conftest import WORDS, make_model, make_tokenizer

SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "max_position_embeddings": 64,
}
BATCH = Rollouts(
    prompt_ids=[[5, 6, 7, 8, 9, 10], [11]], completion_ids=[[12, 13], [14, 15, 16, 2]]
).batch()


def build(kind: str, **options):
    """A micro model of a family with weights large enough that a fault is many nats."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def agreement(model):
    return compare_with_own_forward(backbone_forward(40), model, model, BATCH, 40)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen3", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Phi", {}),
    ],
)
def test_families_whose_head_is_known_agree(kind, options):
    found = agreement(build(kind, **options))
    assert found.error < 1e-4 < found.bound == BOUND and found.problem is None
    assert found.change_by_later < 1e-4
    assert found.tokens == 6


def test_a_head_that_does_more_than_its_config_says_is_named():
    model = build("ModernBertDecoder", cls_token_id=0, sep_token_id=0, pad_token_id=0)
    found = agreement(model)
    assert found.error > 0.1 and not found.only_padded
    with pytest.raises(
        DataError, match=r"the teacher ModernBertDecoderForCausalLM .* further layer"
    ):
        require_agreement("teacher", found)


@pytest.mark.parametrize("fault", ["soft cap", "scale", "bias", "final layer"])
def test_faults_that_no_config_tells_are_named(fault):
    model = build("Qwen3")
    own = model.forward

    def changed(*args, **kwargs):
        out = own(*args, **kwargs)
        ramp = torch.linspace(0, 1, 40)
        out.logits = {
            "soft cap": 2.0 * torch.tanh(out.logits / 2.0),
            "scale": 1.1 * out.logits,
            "bias": out.logits + ramp,
            "final layer": out.logits.roll(1, -1),
        }[fault]
        return out

    model.forward = changed
    found = agreement(model)
    assert found.error > found.bound and found.problem and not found.only_padded


def test_padding_that_is_counted_is_named():
    """GPT-2 counts positions from the first column; this forward does not tell it where a row begins."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.transformer.wpe.weight.data.normal_()

    def without_positions(model, part):
        hidden = model.transformer(part.input_ids, attention_mask=part.attention_mask)[0]
        end = hidden.shape[1] - 1
        return hidden[:, end - part.num_completion : end], read_head(model, 40)

    found = compare_with_own_forward(without_positions, model, model, BATCH, 40)
    assert found.error > found.bound and found.only_padded and "padding" in str(found.problem)
    assert agreement(model).problem is None, "the forward that passes positions is right"


BIDIRECTIONAL = {
    "Bert": {},
    "BertGeneration": {},
    "Roberta": {"pad_token_id": 1},
    "Electra": {"embedding_size": 16},
    "RoFormer": {"embedding_size": 16},
    "Gemma3Text": {"use_bidirectional_attention": True},
}


@pytest.mark.parametrize("kind", BIDIRECTIONAL)
@pytest.mark.parametrize("completion", [[12], [12, 13, 14, 2]])
def test_a_model_that_sees_what_it_predicts_is_named(kind, completion):
    model = build(kind, **BIDIRECTIONAL[kind])
    batch = Rollouts(prompt_ids=[[5, 6, 7], [11, 8]], completion_ids=[completion] * 2).batch()
    found = compare_with_own_forward(backbone_forward(40), model, model, batch, 40)
    assert found.change_by_later > 10 * BOUND and not found.only_padded
    with pytest.raises(DataError, match="both directions"):
        require_agreement("student", found)


def test_an_encoder_whose_config_makes_it_a_decoder_is_causal():
    found = agreement(build("BertGeneration", is_decoder=True))
    assert found.problem is None and found.change_by_later < 1e-4


def test_padding_on_the_right_that_changes_the_numbers_is_named():
    """Sparse attention takes other keys of equal score where columns follow, as behind the longest row."""
    model = build("Qwen3")

    def with_ties(model, part):
        hidden, head = backbone_forward(40)(model, part)
        return hidden + 3.0 * (part.attention_mask == 0).any(), head

    found = compare_with_own_forward(with_ties, model, model, BATCH, 40)
    assert found.error > found.bound and found.only_padded and "padding" in str(found.problem)


def recurrent():
    """A model whose state takes in whatever stands before a row: RWKV reads no attention mask."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "attention_hidden_size": 16,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(3)
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[5, 6, 7, 8], [9, 10, 11, 12]], [[13, 14], [15, 2]]),
        ([[5, 6, 7, 8]], [[13, 14]]),
        # The shortest has no token that both models know: it is not compared.
        ([[5, 6, 7, 8], [9]], [[13, 14], [39, 2]]),
    ],
)
def test_a_fault_of_padding_does_not_wait_for_a_batch_with_padding(prompts, completions):
    batch = Rollouts(prompt_ids=prompts, completion_ids=completions).batch()
    model = recurrent()
    found = compare_with_own_forward(backbone_forward(39), model, model, batch, 39)
    assert found.error > found.bound and found.only_padded
    alone = compare_with_own_forward(backbone_forward(39), model, model, batch, 39, padded=False)
    assert alone.problem is None and alone.tokens == found.tokens > 0


def test_a_teacher_object_scores_as_its_model_computes_or_is_refused():
    """Oracle: the model's own forward of each sequence alone."""
    sequences, starts = [[5, 6, 7, 8, 9, 12, 13], [11, 14, 15]], [5, 1]
    model = recurrent()
    expected = [
        model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    tokens = torch.tensor([ids[-2:] for ids in sequences]).flatten()
    found = LocalTeacher(model, 40).score(sequences, starts, None, 4)
    torch.testing.assert_close(
        found.logprobs, torch.cat(expected).gather(1, tokens[:, None])[:, 0].detach()
    )
    model = build("ModernBertDecoder", cls_token_id=0, sep_token_id=0, pad_token_id=0)
    with pytest.raises(DataError, match=r"the teacher ModernBertDecoder.* off its own forward"):
        LocalTeacher(model, 40).score(sequences, starts, None, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_in_8_bits_a_row_is_compared_alone(packed):
    """There a row's numbers depend on the rows beside it, as here those of the last layer."""
    model = build("Qwen3")
    model.model.layers[-1].register_forward_hook(
        lambda layer, read, out: out + out.amax((0, 1), keepdim=True)
    )
    model.is_loaded_in_8bit = packed
    found = agreement(model)
    assert (found.problem is None) == packed and found.tokens == 6
    if packed:
        model.register_forward_hook(
            lambda layer, read, out: setattr(out, "logits", 1.1 * out.logits)
        )
        assert agreement(model).problem, "a head that does more is found all the same"


def test_16_bit_models_have_the_wider_bound():
    model = build("Qwen3").bfloat16()
    found = agreement(model)
    assert 0 < found.error < found.bound == 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_a_teachers_head_is_merged_into_it(tied):
    base = make_model(seed=1, tie_word_embeddings=tied)
    targets = ["q_proj", "lm_head"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    ids = torch.arange(4, 14)[None]
    expected = model.eval()(ids).logits.log_softmax(-1)
    with pytest.raises(ConfigError, match="adapter on its output head"):
        read_head(model, 40)
    teacher, shared = load_teacher(model, make_model(seed=0), make_tokenizer())
    with torch.no_grad():
        states = teacher.base_model.model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(read_head(teacher, shared).logprobs(states, 1.0), expected[0])


def test_a_teacher_object_is_frozen_and_loses_its_dropout():
    model = make_model(seed=1)
    model.config.attention_dropout = 0.5
    teacher, _ = load_teacher(model.train(), make_model(seed=0), make_tokenizer())
    assert not any(module.training for module in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())


def test_a_teacher_objects_tokenizer_is_compared_where_its_name_tells(micro_lab, tmp_path, caplog):
    student, tokenizer = make_model(seed=0), make_tokenizer()
    make_model(seed=1).save_pretrained(tmp_path)
    make_tokenizer([*WORDS[:20], *reversed(WORDS[20:])]).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"different tokenizers: id 2[0-9] is"):
        load_teacher(other, student, tokenizer)
    with pytest.raises(DataError, match="knows 30 ids, the student's tokenizer has 40"):
        load_teacher(make_model(seed=1, vocab_size=30), student, tokenizer)
    assert not caplog.records
    load_teacher(AutoModelForCausalLM.from_pretrained(micro_lab.teacher), student, tokenizer)
    assert "cannot be known" not in caplog.text
    load_teacher(make_model(seed=1), student, tokenizer)
    assert "the teacher's tokenizer cannot be known" in caplog.text


def test_a_teacher_object_takes_no_loading_options_and_no_weights_of_the_student():
    student = make_model(seed=0)
    with pytest.raises(ConfigError, match="teacher_model_init_kwargs"):
        load_teacher(
            make_model(seed=1), student, make_tokenizer(), init_kwargs={"dtype": "bfloat16"}
        )
    with pytest.raises(ConfigError, match="share weights that train"):
        load_teacher(student, student, make_tokenizer())


def test_a_model_without_a_backbone_of_its_own_is_refused():
    few = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 16}
    config = transformers.Llama4TextConfig(**SIZES, **few)
    with pytest.raises(ConfigError, match="the teacher Llama4ForCausalLM gives no states"):
        require_backbone("teacher", transformers.Llama4ForCausalLM(config))
    require_backbone("student", get_peft_model(make_model(seed=1), LoraConfig(r=2)))


def test_a_teacher_with_virtual_tokens_is_refused():
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="the teacher has virtual tokens"):
        require_backbone("teacher", get_peft_model(make_model(seed=1), options))
