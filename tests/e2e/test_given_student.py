"""Students that are adapters, frozen, in training mode or with a processor. Oracle: peft's own loading."""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import CPU, OURS, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from taopd.errors import ConfigError, DataError
from taopd.models.loading import load_model, load_tokenizer
from taopd.trainer.build.from_settings import load_inputs
from taopd.trainer.build.given_student import given_student
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.reference_student import ReferenceStudent
from taopd.trainer.settings_file import parse_settings
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model, make_tokenizer, write_config

IDS = torch.arange(4, 34).reshape(2, 15)
TARGETS = ["q_proj", "v_proj", "down_proj"]
ANCHORED = {"anchor_fraction": 1.0, "anchor_responses": 1.0, "anchor_coef": 1.0}
NEW = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}


def logprobs(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(IDS).logits.log_softmax(-1)
    model.train(training)
    return found


def base_of(lab):
    return AutoModelForCausalLM.from_pretrained(lab.student, dtype=torch.float32)


@pytest.fixture
def adapter(micro_lab, tmp_path):
    """A LoRA folder whose adapter was trained before: far from its base, scales of several ranks."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 3},
        target_modules=TARGETS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(5)
    model = get_peft_model(base_of(micro_lab), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def as_given(kind, lab, folder):
    if kind == "folder":
        return str(folder)
    if kind == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base_of(lab), folder, is_trainable=kind == "trainable")


def trainer_of(lab, tmp_path, student, peft_config=None, **settings):
    few = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
    return TeachabilityTrainer(
        model=student,
        teacher_model=str(lab.teacher),
        args=TeachabilityConfig(output_dir=str(tmp_path / "run"), **(few | ANCHORED | settings)),
        train_dataset=make_trainer(lab, tmp_path).train_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def assert_loads_as_trained(folder, lab, model):
    expected = logprobs(model)
    for loaded in (
        load_model(folder, dtype="float32"),
        PeftModel.from_pretrained(base_of(lab), folder),
    ):
        assert (logprobs(loaded) - expected).abs().max() < 1e-4


def anchors(trainer):
    return [e["loss/anchor_nats"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("new", [False, True], ids=["goes on", "merged first"])
@pytest.mark.parametrize("kind", ["folder", "transformers", "trainable", "frozen"])
def test_an_adapter_is_trained_anchored_and_saved_as_it_is(
    micro_lab, tmp_path, adapter, kind, new, caplog
):
    start = logprobs(PeftModel.from_pretrained(base_of(micro_lab), adapter))
    assert (start - logprobs(base_of(micro_lab))).abs().max() > 0.1, "vacuous"
    config = LoraConfig(**NEW) if new else None
    given = as_given(kind, micro_lab, adapter)
    trainer = trainer_of(
        micro_lab, tmp_path, given, config, max_steps=3, save_strategy="steps", save_steps=2
    )
    assert ("merged" if new else "goes on training") in caplog.text
    torch.testing.assert_close(logprobs(trainer.model), start, atol=1e-4, rtol=0)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, w in trainer.model.named_parameters() if not torch.equal(w, before[name])
    }
    assert changed and all("lora_" in name for name in changed)
    assert abs(anchors(trainer)[0]) < 1e-6 < anchors(trainer)[-1]
    assert (logprobs(trainer.model) - start).abs().max() > 1e-3, "vacuous"
    trainer.save_model(str(tmp_path / "saved"))
    assert_loads_as_trained(tmp_path / "saved", micro_lab, trainer.model)
    # A checkpoint is the student of its step, and training goes on from it as if it had not stopped.
    again = trainer_of(
        micro_lab, tmp_path / "again", as_given(kind, micro_lab, adapter), config, max_steps=3
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, dict(trainer.model.named_parameters())[name]), name
    assert anchors(again)[-1] == anchors(trainer)[-1], "the reference is not the resumed student"
    stopped = trainer_of(
        micro_lab, tmp_path / "stopped", as_given(kind, micro_lab, adapter), config, max_steps=2
    )
    stopped.train()
    assert_loads_as_trained(tmp_path / "run" / "checkpoint-2", micro_lab, stopped.model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA on model.embed_tokens"),
    ],
)
def test_adapters_that_cannot_be_saved_as_one_are_refused(
    micro_lab, tmp_path, adapter, options, named
):
    with pytest.raises(ConfigError, match=f"with {named} the two cannot be saved"):
        trainer_of(micro_lab, tmp_path, str(adapter), LoraConfig(**(NEW | options)))


@pytest.mark.parametrize("kind", ["folder", "frozen"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_adapters_go_on_training_too(micro_lab, tmp_path, kind, options):
    torch.manual_seed(5)
    model = get_peft_model(
        base_of(micro_lab), LoraConfig(**NEW, init_lora_weights=False, **options)
    )
    for weight in model.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight) * weight.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    given = as_given(kind, micro_lab, tmp_path / "adapter")
    trainer = trainer_of(micro_lab, tmp_path, given)
    torch.testing.assert_close(logprobs(trainer.model), logprobs(model), atol=1e-4, rtol=0)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert abs(anchors(trainer)[0]) < 1e-6 < anchors(trainer)[-1]
    assert_loads_as_trained(tmp_path / "saved", micro_lab, trainer.model)


def test_a_student_of_which_nothing_trains_is_refused(micro_lab, tmp_path):
    with pytest.raises(ConfigError, match="no weight of the student trains"):
        trainer_of(micro_lab, tmp_path, base_of(micro_lab).requires_grad_(False))


@pytest.mark.parametrize("call", ["disable_adapter_layers", "merge_adapter"])
def test_an_adapter_that_would_not_train_as_it_is_is_refused(micro_lab, tmp_path, adapter, call):
    student = PeftModel.from_pretrained(base_of(micro_lab), adapter, is_trainable=True)
    getattr(student, call)()
    undo = {
        "disable_adapter_layers": "enable_adapter_layers",
        "merge_adapter": "unmerge_adapter",
    }[call]
    with pytest.raises(ConfigError, match=rf"the student's adapter is .*{undo}\(\)"):
        trainer_of(micro_lab, tmp_path, student)
    getattr(student, undo)()
    trainer_of(micro_lab, tmp_path, student, max_steps=1).train()


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_several_active_adapters_are_refused_by_name(micro_lab, tmp_path, kind):
    """Their checkpoint was not resumed, and what was saved was loaded with one of them."""
    student, configs = base_of(micro_lab), [LoraConfig(**NEW), LoraConfig(**NEW)]
    if kind == "peft":
        student = get_peft_model(student, configs[0], adapter_name="a")
        student.add_adapter("b", configs[1])
        student.base_model.set_adapter(["a", "b"])
    else:
        for name, config in zip("ab", configs, strict=True):
            student.add_adapter(config, adapter_name=name)
        student.set_adapter(["a", "b"])
    for new in (None, LoraConfig(**NEW)):
        with pytest.raises(ConfigError, match=r"several active adapters \(a, b\)"):
            trainer_of(micro_lab, tmp_path, student, new)


def test_an_adapter_that_is_merged_already_has_a_new_one_on_top(micro_lab, tmp_path, adapter):
    expected = PeftModel.from_pretrained(base_of(micro_lab), adapter)
    student = PeftModel.from_pretrained(base_of(micro_lab), adapter)
    student.merge_adapter()
    trainer = trainer_of(micro_lab, tmp_path, student, LoraConfig(**NEW))
    assert torch.allclose(logprobs(trainer.model), logprobs(expected), atol=1e-4)


def test_an_architecture_without_checkpointing_is_refused_by_name(micro_lab, tmp_path):
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    student = transformers.OpenAIGPTLMHeadModel(config)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=True .*OpenAIGPTLMHeadModel"):
        trainer_of(micro_lab, tmp_path, student, gradient_checkpointing=True)
    trainer_of(micro_lab, tmp_path, student, gradient_checkpointing=False)


def test_the_reference_has_the_first_head_where_the_head_trains(micro_lab, tmp_path):
    config = LoraConfig(**NEW, modules_to_save=["lm_head"])
    trainer = trainer_of(micro_lab, tmp_path, str(micro_lab.student), config)
    start, reference = logprobs(trainer.model), trainer._anchor._reference
    trainer.train()
    assert abs(anchors(trainer)[0]) < 1e-6 < anchors(trainer)[-1]
    head, now = reference.head(trainer._head, trainer.model), trainer._head(trainer.model)
    assert not torch.equal(head.weight, now.weight)
    with torch.no_grad(), reference.weights(trainer.model):
        torch.testing.assert_close(logprobs(trainer.model), start)
        states = trainer.model.base_model.model.model(IDS).last_hidden_state
    torch.testing.assert_close(head.logprobs(states.flatten(0, 1), 1.0), start.flatten(0, 1))


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_has_no_dropout(micro_lab, tmp_path, lora):
    student = base_of(micro_lab).train()
    student.config.attention_dropout = 0.5
    config = LoraConfig(**NEW, lora_dropout=0.5) if lora else None
    trainer = trainer_of(micro_lab, tmp_path, student, config)
    reference = ReferenceStudent(trainer.model, trainer.accelerator)
    trainer.model.train()
    with reference.weights(trainer.model) as model:
        assert not any(module.training for module in model.modules())
    assert trainer.model.training


@pytest.mark.parametrize(
    "callbacks",
    [["x"], [object], TrainerCallback()],
    ids=["a text", "a class", "one that is no list"],
)
def test_callbacks_that_are_none_are_named(micro_lab, tmp_path, callbacks):
    args = TeachabilityConfig(output_dir=str(tmp_path), **CPU)
    with pytest.raises(ConfigError, match=r"callbacks: (each must be a|must be a list)"):
        TeachabilityTrainer(str(micro_lab.student), args=args, callbacks=callbacks)


def test_a_run_folder_that_is_a_file_is_named(micro_lab, tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match=r"output_dir=.* is a file; the output must be a folder"):
        make_trainer(micro_lab, tmp_path)


def test_an_adapter_folder_without_a_tokenizer_has_its_bases(micro_lab, adapter):
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(micro_lab.student).get_vocab()


@pytest.mark.parametrize("given", [True, False])
def test_a_tokenizer_without_an_end_is_refused_by_name(tmp_path, given):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    make_model(seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU)
    with pytest.raises(ConfigError, match="tokenizer has no end-of-sequence token: set its eos_"):
        given_student(str(tmp_path), args, tokenizer if given else None, None)


def test_a_processor_stands_for_its_tokenizer(tmp_path, caplog):
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    plain = make_tokenizer()
    plain.add_tokens(list(names.values()))
    tokenizer = type(plain)(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=names,
    )
    images = getattr(transformers, "Gemma3ImageProcessorPil", transformers.Gemma3ImageProcessor)
    processor = transformers.Gemma3Processor(
        image_processor=images(), tokenizer=tokenizer, chat_template="{{ messages[0]['content'] }}"
    )
    make_model(seed=0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    args = TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU)
    by_name = given_student(str(tmp_path), args, None, None).processing_class
    given = given_student(str(tmp_path), args, processor, None).processing_class
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert by_name.get_vocab() == given.get_vocab() == own.get_vocab()
    assert given.chat_template == by_name.chat_template == processor.chat_template
    assert "only text is distilled" in caplog.text


def test_options_of_loading_reach_an_adapters_tokenizer_and_the_next_trainer(
    micro_lab, tmp_path, adapter, monkeypatch
):
    asked = []

    def load(name, revision):
        asked.append(revision)
        return make_tokenizer()

    monkeypatch.setattr("taopd.trainer.build.given_student.load_tokenizer", load)
    args = TeachabilityConfig(
        str(tmp_path / "run"),
        model_init_kwargs={"dtype": "bfloat16", "revision": "v2"},
        max_steps=1,
        **(CPU | OURS),
    )
    for _ in range(2):
        given = TeachabilityTrainer(
            str(adapter), str(micro_lab.teacher), args, [{"prompt": "1 + 2 ="}] * 8
        )
        assert given.model.dtype == torch.bfloat16
        assert args.model_init_kwargs["dtype"] == "bfloat16"
    assert asked == ["v2", "v2"]


def test_a_revision_in_the_options_is_that_of_the_tokenizer_too(micro_lab, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "taopd.models.prompts.load_tokenizer",
        lambda name, revision: asked.append(revision) or make_tokenizer(),
    )
    options = {"model_init_kwargs": {"revision": "v2"}, "max_steps": 1}
    config = write_config(micro_lab, tmp_path, gradient_checkpointing=False, **options)
    load_inputs(parse_settings(str(config), []))
    assert asked == ["v2"]


def without(folder, name, kept=0):
    """Drop a tensor of a saved model, or keep so many of its rows."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    cut = weights.pop(name)[:kept].clone()
    save_file(weights | ({name: cut} if kept else {}), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kept", "told"), [(0, "incomplete: 1 tensors are missing"), (3, "do not fit its config")]
)
def test_a_named_student_without_all_its_weights_is_refused(micro_lab, tmp_path, kept, told):
    folder = tmp_path / "student"
    shutil.copytree(micro_lab.student, folder)
    without(folder, "model.layers.1.mlp.down_proj.weight", kept)
    args = TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU)
    with pytest.raises(DataError, match=told):
        TeachabilityTrainer(str(folder), str(micro_lab.teacher), args)


def test_a_named_student_that_writes_no_text_is_refused(micro_lab, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=40, intermediate_size=16, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    args = TeachabilityConfig(output_dir=str(tmp_path / "run"), **CPU)
    with pytest.raises(ConfigError, match="model is a BertForMaskedLM: pass a folder"):
        TeachabilityTrainer(str(tmp_path / "bert"), str(micro_lab.teacher), args)


def test_a_quantization_that_is_given_twice_is_refused(micro_lab, tmp_path):
    packed = {"load_in_4bit": True}
    args = TeachabilityConfig(
        str(tmp_path / "run"), model_init_kwargs={"quantization_config": packed}, **CPU
    )
    with pytest.raises(ConfigError, match="keep one of them"):
        given_student(str(micro_lab.student), args, make_tokenizer(), None, packed)


def test_layers_that_are_cut_off_in_the_model_alone_are_told_before_training(micro_lab, tmp_path):
    """transformers refuses the config when it is saved: at the first checkpoint, or at the end."""
    model = load_model(micro_lab.student)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    with pytest.raises(
        ConfigError, match=r"config could not be saved .*`num_hidden_layers` \(1\) must"
    ):
        trainer_of(micro_lab, tmp_path, model)
    model.config.layer_types = model.config.layer_types[:1]
    trainer_of(micro_lab, tmp_path, model)


def test_a_generation_config_with_flags_without_effect_is_saved_as_it_came(micro_lab, tmp_path):
    """As published ones have them; the trainer gives it the tokenizer's padding id."""
    folder = tmp_path / "student"
    shutil.copytree(micro_lab.student, folder)
    path = folder / "generation_config.json"
    held = json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}
    del held["pad_token_id"]
    path.write_text(json.dumps(held))
    trainer = trainer_of(micro_lab, tmp_path, str(folder), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    for saved in (tmp_path / "run" / "checkpoint-2", tmp_path / "end"):
        assert json.loads((saved / path.name).read_text())["temperature"] == 0.6
        assert load_model(saved).generation_config.pad_token_id == 0
