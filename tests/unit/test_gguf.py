"""Models from a GGUF file. Oracles: the model that was written, and the package gguf's own unpacking."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from taopd.errors import DataError
from taopd.experiments.smollm2.weights import convert
from taopd.models import gguf as gguf_files
from taopd.models.loading import load_config, load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.models.stop_tokens import sampler_stop_ids
from taopd.preflight.subject import Subject
from taopd.teachers import load_teacher
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.cost import load_shape
from taopd.trainer.settings_file import parse_settings
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS
from tests.gguf_files import TOKENS, make_gemma2, make_llama, write_gguf

installed = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"
)
IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_llama(seed=1)


@pytest.fixture(scope="module")
def file(teacher, tmp_path_factory):
    """The teacher as a file of float32."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    path = tmp_path_factory.mktemp("gguf") / "micro.gguf"
    write_gguf(teacher, path)
    return path


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_a_file_holds_the_model_that_was_written(file, teacher):
    found = load_model(file, dtype="float32")
    assert torch.equal(logits(found), logits(teacher))
    assert found.config.name_or_path == str(file) and not found.is_quantized
    assert load_model(file.parent).config.name_or_path == str(file)
    named = load_model(file.parent, gguf_file=file.name)
    assert torch.equal(logits(named), logits(teacher))
    shape = load_shape(str(file))
    assert shape.num_parameters == sum(weight.numel() for weight in teacher.parameters())
    assert load_config(file).vocab_size == len(TOKENS)


@installed
def test_packed_blocks_are_unpacked_as_gguf_does(teacher, tmp_path):
    unpacked = write_gguf(teacher, tmp_path / "q8.gguf", packed=True)
    expected = make_llama(seed=2)
    expected.load_state_dict({name: torch.tensor(values) for name, values in unpacked.items()})
    assert not torch.equal(logits(expected), logits(teacher))
    assert torch.equal(logits(load_model(tmp_path / "q8.gguf")), logits(expected))


def test_a_files_tokens_are_compared_with_the_students(file, teacher, micro_lab, tmp_path):
    student = load_model(micro_lab.student)
    # None beyond those of the file: transformers adds an unknown token of its own.
    assert load_tokenizer(file).get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    _, shared = load_teacher(str(file), student, make_tokenizer())
    assert shared == len(WORDS)
    other = [*TOKENS]
    other[7], other[8] = other[8], other[7]
    write_gguf(teacher, tmp_path / "other.gguf", tokens=other)
    with pytest.raises(DataError, match="id 7 is '3' for the student, '4' for the teacher"):
        load_teacher(str(tmp_path / "other.gguf"), student, make_tokenizer())


def trained(tmp_path, micro_lab, student, teacher, seen=None, **more):
    settings = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 2, "budget": 0.3} | more
    trainer = TeachabilityTrainer(
        model=str(student),
        teacher_model=str(teacher),
        args=TeachabilityConfig(output_dir=str(tmp_path / "run"), **settings),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
        processing_class=make_tokenizer(),
    )
    kept = []
    trainer.observers.append(lambda seen: kept.append(seen.choice.selection.kept.clone()))
    trainer.observers.append([].append if seen is None else seen.append)
    trainer.train()
    return trainer, kept


@installed
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_begin_end_and_padding_are_those_of_the_file(family, teacher, tmp_path):
    """Oracle: what was written. Before 5.18 transformers named others, for each family in its own way."""
    write_gguf(teacher, tmp_path / "x.gguf", family=family)
    found = load_tokenizer(tmp_path / "x.gguf")
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert found.special_tokens_map == ends
    assert found.get_vocab() == {token: i for i, token in enumerate(TOKENS)}


ENDS = {"eos": "<eos>", "eot": "w0", "eom": "w1", "fim_pad": "w2", "fim_sep": "w3"}
NAMED = [TOKENS.index(token) for token in ("<eos>", "w0", "w1")]


@installed
@pytest.mark.parametrize(
    ("ends", "stops", "end"),
    [
        (ENDS, NAMED, "<eos>"),
        ({"eos": "w0", "eot": "w0"}, NAMED[1], "w0"),
        ({"eot": "w1"}, NAMED[2], "w1"),
        ({}, None, None),
    ],
)
def test_a_file_stops_at_every_end_that_it_names(teacher, tmp_path, ends, stops, end):
    """Not at padding of a gap, and without an end of its own not at that of the family's default."""
    write_gguf(teacher, tmp_path / "x.gguf", ends=ends)
    # Another model's, beside the file.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9, "temperature": 0.5}')
    model, tokenizer = load_model(tmp_path / "x.gguf"), load_tokenizer(tmp_path / "x.gguf")
    assert model.generation_config.eos_token_id == stops and tokenizer.eos_token == end
    assert model.generation_config.temperature is None
    expected = [] if stops is None else [stops] if isinstance(stops, int) else stops
    assert sampler_stop_ids(tokenizer, model) == expected
    settings = parse_settings(None, ["--model_name_or_path", str(tmp_path / "x.gguf"), *REST])
    subject = Subject(settings=settings)
    subject._errors["inputs"] = ValueError("not loaded")
    assert subject.student_generation_config.eos_token_id == stops


REST = [
    "--teacher_model_name_or_path",
    "x",
    "--dataset_name",
    "x",
    "--output_dir",
    "x",
    "--use_cpu",
    "true",
    "--bf16",
    "false",
]


@installed
def test_an_end_that_is_no_number_or_none(teacher, tmp_path):
    write_gguf(teacher, tmp_path / "x.gguf", ends=ENDS)
    content = (tmp_path / "x.gguf").read_bytes()
    at = content.index(b"tokenizer.ggml.eot_token_id") + len(b"tokenizer.ggml.eot_token_id")
    none = content[: at + 4] + b"\xff" * 4 + content[at + 8 :]
    (tmp_path / "none.gguf").write_bytes(none)
    ends = load_model(tmp_path / "none.gguf").generation_config.eos_token_id
    assert ends == [NAMED[0], NAMED[2]]
    (tmp_path / "real.gguf").write_bytes(content[:at] + b"\x06" + content[at + 1 :])
    for load in (load_model, load_tokenizer):
        with pytest.raises(DataError, match="eot_token_id is no whole number"):
            load(tmp_path / "real.gguf")


@installed
def test_sampling_stops_at_them_and_the_audit_knows_those_of_a_teacher(
    teacher, micro_lab, tmp_path
):
    """A completion goes on after none of them; what a student is saved as stops there too."""
    file = tmp_path / "ends.gguf"
    write_gguf(teacher, file, ends=ENDS)
    seen = []
    trainer, _ = trained(
        tmp_path, micro_lab, file, micro_lab.teacher, seen, max_completion_length=24
    )
    rows = [
        ids[mask.bool()].tolist()
        for one in seen
        for ids, mask in zip(one.batch["completion_ids"], one.batch["completion_mask"], strict=True)
    ]
    assert {row[-1] for row in rows} >= {*NAMED[1:]}, "vacuous"
    assert not any(set(row[:-1]) & set(NAMED) for row in rows)
    trainer.save_model(str(tmp_path / "saved"))
    assert load_model(tmp_path / "saved").generation_config.eos_token_id == NAMED
    (tmp_path / "other").mkdir()
    other, _ = trained(tmp_path / "other", micro_lab, micro_lab.student, file, max_steps=1)
    assert other.foreign_ends == tuple(sorted(NAMED[1:]))


def test_a_file_becomes_a_folder_of_the_same_model_and_tokens(file, teacher, tmp_path):
    convert(file, tmp_path / "folder")
    assert torch.equal(logits(load_model(tmp_path / "folder")), logits(teacher))
    one, other = load_tokenizer(tmp_path / "folder"), load_tokenizer(file)
    assert one.special_tokens_map == other.special_tokens_map
    assert one.get_vocab() == other.get_vocab()


def test_a_file_teaches_as_the_folder_does(file, teacher, micro_lab, tmp_path):
    teacher.save_pretrained(tmp_path / "folder")
    make_tokenizer().save_pretrained(tmp_path / "folder")
    runs = [
        trained(tmp_path / name, micro_lab, micro_lab.student, source)
        for name, source in (("a", file), ("b", tmp_path / "folder"))
    ]
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(run[0].model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


def test_a_student_from_a_file_trains_and_is_saved_as_a_folder(file, teacher, micro_lab, tmp_path):
    trainer, _ = trained(tmp_path, micro_lab, file, micro_lab.teacher)
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(trainer.model))
    assert not torch.equal(logits(saved), logits(teacher))
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_the_check_reads_configs_from_a_file(file, micro_lab, tmp_path):
    flags = {
        "--model_name_or_path": micro_lab.student,
        "--teacher_model_name_or_path": file,
        "--dataset_name": micro_lab.prompts,
        "--output_dir": tmp_path,
        "--use_cpu": "true",
        "--bf16": "false",
        "--max_completion_length": 6,
    }
    subject = Subject(
        settings=parse_settings(None, [str(x) for pair in flags.items() for x in pair])
    )
    subject.inputs.teacher  # noqa: B018 (loads)
    assert subject.configs[1].hidden_size == 32
    alone = Subject(settings=subject.settings)
    alone._errors["inputs"] = ValueError("not loaded")
    assert alone.configs[1].hidden_size == 32
    assert alone.generation_configs[1].eos_token_id == WORDS.index("<eos>")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(DataError, match="needs the package gguf, which is not installed"):
            load(tmp_path / "x.gguf")


def test_names_that_are_no_file_or_not_one(tmp_path):
    with pytest.raises(DataError, match="no such GGUF file"):
        load_model(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("a text")
    with pytest.raises(DataError, match="does not begin with GGUF"):
        load_tokenizer(tmp_path / "text.gguf")
    (tmp_path / "second.gguf").write_text("a text")
    with pytest.raises(DataError, match="holds 2 GGUF files: name one of them"):
        load_model(tmp_path)


def test_a_damaged_file_is_one_message(file, tmp_path):
    whole, broken = file.read_bytes(), tmp_path / "broken.gguf"
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for case in range(24):
        content = bytearray(whole)
        if case % 2:
            content = content[: len(content) * case // 24]
        else:
            # In the table of tensors: names, shapes, kinds and places.
            for place in torch.randint(0, 900, (3,), generator=generator).tolist():
                content[whole.index(b"blk.0.") + place] ^= 0xFF
        broken.write_bytes(content)
        try:
            load_model(broken)
            load_tokenizer(broken)
            outcomes.add("read")  # a byte of a name or of a word
        except DataError as error:
            assert str(broken) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot load the model"):
        load_model(broken)


CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
GEMMAS = [
    CAPS | {"query_pre_attn_scalar": 16},
    {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    {"final_logit_softcapping": 0.0, "attn_logit_softcapping": 0.0, "query_pre_attn_scalar": 16},
    CAPS | {"query_pre_attn_scalar": 64},
]


@installed
@pytest.mark.parametrize("options", GEMMAS)
def test_a_files_caps_scale_and_window_are_computed_with(tmp_path, options):
    """transformers reads none of them but the window, and takes a Gemma's of another size."""
    own = {name: value or None for name, value in options.items()}
    teacher = make_gemma2(**own)
    said = {name: options[name] for name in CAPS} | {"attention.sliding_window": 4}
    said |= {"attention.key_length": 16, "attention.value_length": 16}
    if (
        options["query_pre_attn_scalar"] != 16
    ):  # else it is the width of a head, as llama.cpp has it
        said["attention.scale"] = options["query_pre_attn_scalar"] ** -0.5
    write_gguf(teacher, tmp_path / "x.gguf", family="gemma2", said=said)
    found = load_model(tmp_path / "x.gguf", dtype="float32")
    assert torch.equal(logits(found), logits(teacher))
    config = load_config(tmp_path / "x.gguf")
    assert {name: getattr(config, name) for name in own} == own


@installed
def test_the_largest_gemma_scales_by_the_hidden_width(tmp_path):
    sizes = {"num_hidden_layers": 46, "hidden_size": 48, "head_dim": 16, "num_attention_heads": 2}
    path = tmp_path / "x.gguf"
    write_gguf(make_gemma2(**sizes), path, family="gemma2", said={"attention.key_length": 16})
    assert load_config(path).query_pre_attn_scalar == 24


@installed
@pytest.mark.parametrize("family", ["phi3", "stablelm", "nemotron"])
def test_a_part_of_a_head_that_rotates_is_the_files(teacher, tmp_path, family):
    """Oracle: what was written: 16 of a head's numbers rotate, and the base."""
    teacher.config.rope_parameters["rope_theta"] = 5000.0
    try:
        write_gguf(teacher, tmp_path / "x.gguf", family=family)
    finally:
        teacher.config.rope_parameters["rope_theta"] = 10000.0
    config = load_config(tmp_path / "x.gguf")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert config.rope_parameters["partial_rotary_factor"] * width == 16
    assert config.rope_parameters["rope_theta"] == 5000.0


@installed
@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
def test_positions_that_transformers_would_read_otherwise_are_refused(teacher, tmp_path, name):
    write_gguf(teacher, tmp_path / "x.gguf", extra=[name])
    with pytest.raises(DataError, match="stretches its positions"):
        load_model(tmp_path / "x.gguf")


def test_a_file_is_not_quantized_again(file):
    with pytest.raises(DataError, match="a GGUF file is unpacked and not quantized again"):
        load_model(file, quantization_config={"load_in_8bit": True})
