"""Model folders and GGUF files that are cut short, damaged or of two models: one message for each."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from taopd import cli
from taopd.errors import DataError
from taopd.models.loading import load_config, load_model, load_tokenizer
from tests.conftest import MicroLab, write_config
from tests.e2e.test_trainer import CPU
from tests.gguf_files import TOKENS, make_llama, write_gguf

WEIGHTS = "model.safetensors"
FP8 = torch.float8_e4m3fn


def cut(name, length):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return damage


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def config(**settings):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return damage


def tensors(change):
    def damage(folder):
        held = change(load_file(folder / WEIGHTS))
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def scaled(held):
    """In FP8 with a scale for each matrix, as other tools write them."""
    layers = [name for name in held if "_proj." in name]
    scales = {f"{name}_scale": held[name].float().abs().max() / 448 for name in layers}
    packed = {name: (held[name] / scales[f"{name}_scale"]).to(FP8) for name in layers}
    return held | scales | packed


# by name: what is done to the folder, what loads it, what the message says
FOLDERS = {
    "weights without their end": (
        cut(WEIGHTS, -50),
        load_model,
        f"{WEIGHTS} .*is cut short or damaged",
    ),
    "weights without their header": (
        cut(WEIGHTS, 100),
        load_model,
        f"{WEIGHTS} .100 bytes. is cut",
    ),
    "empty weights": (cut(WEIGHTS, 0), load_model, f"{WEIGHTS} .0 bytes. is cut short"),
    "half a tokenizer": (
        cut("tokenizer.json", 500),
        load_tokenizer,
        "tokenizer.json .500 bytes. is cut",
    ),
    "another tokenizer": (
        written("tokenizer.json", '{"model": {"type": "WordLevel"}}'),
        load_tokenizer,
        "tokenizer.json .* is cut short or damaged",
    ),
    "a list": (
        written("tokenizer_config.json", "[]"),
        load_tokenizer,
        "expected an object, got a list",
    ),
    "half a config": (cut("config.json", 100), load_config, "config.json .100 bytes. is cut short"),
    "half a config of a model": (
        cut("config.json", 100),
        load_model,
        "config.json .100 bytes. is cut",
    ),
    "a word for a number": (config(vocab_size="x"), load_model, "vocab_size.*expected int"),
    "one layer more": (config(num_hidden_layers=5), load_config, "num_hidden_layers"),
    "another width": (
        config(hidden_size=8),
        load_model,
        r"do not fit its config: \S+ is \[.*\] and must be \[.*, as are \d+ others",
    ),
    "more ids": (
        config(vocab_size=50),
        load_model,
        r"embed_tokens.weight|lm_head.weight is \[40, 16\] and must be \[50, 16\]",
    ),
    "a bias for which there is no place": (
        tensors(lambda held: held | {"lm_head.bias": torch.ones(40)}),
        load_model,
        "hold lm_head.bias, which a Qwen3ForCausalLM of its config leaves out",
    ),
    "scales that transformers does not read": (
        tensors(scaled),
        load_model,
        r"hold \S+_proj.weight_scale and \d+ like it.* take the model in 16 bits",
    ),
    "names of a compiled model": (
        tensors(lambda held: {f"_orig_mod.{name}": value for name, value in held.items()}),
        load_model,
        r"are missing, first lm_head.weight, and \d+ have unknown names, first _orig_mod.lm_head",
    ),
    "stop ids that cannot be read": (
        cut("generation_config.json", 20),
        load_model,
        "generation_config.json",
    ),
    **{
        f"an end that is {value!r}": (
            written("generation_config.json", json.dumps({"eos_token_id": value})),
            load_model,
            r"generation_config.json: eos_token_id is .*, and must be a token id, or null",
        )
        for value in ("x", 1.5, -1, [2, "x"], True, {"id": 2})
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_cannot_be_read_is_named(micro_lab: MicroLab, tmp_path, name):
    damage, load, words = FOLDERS[name]
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig(eos_token_id=2).save_pretrained(folder)
    load(folder)
    damage(folder)
    with pytest.raises(DataError, match=words) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_a_layer_that_the_model_lacks_are_passed_over(micro_lab: MicroLab, tmp_path):
    """Extra layers that predict more tokens stand in many checkpoints."""
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(32, 16), "v_head.bias": torch.ones(1)}
    tensors(lambda held: held | extra)(folder)
    assert load_model(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_in_fp8_are_unpacked_into_the_dtype_of_the_model(
    micro_lab: MicroLab, tmp_path, dtype
):
    """Oracle: the weights before they were packed. The kernels for FP8 itself are for GPUs."""
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in FP8")
    folder, ids = tmp_path / "model", torch.tensor([[5, 6, 7, 8]])
    shutil.copytree(micro_lab.student, folder)
    expected = load_model(folder, dtype="float32")(ids).logits

    def packed(held):
        held = scaled({name: value.bfloat16() for name, value in held.items()})
        scales = [name for name in held if name.endswith("_scale")]
        return held | {f"{name}_inv": held.pop(name).reshape(1, 1).float() for name in scales}

    tensors(packed)(folder)
    block = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config(quantization_config={"quant_method": "fp8"} | block)(folder)
    found = load_model(folder, dtype=dtype)
    assert {weight.dtype for weight in found.parameters()} == {getattr(torch, dtype)}
    torch.testing.assert_close(found(ids).logits.float(), expected, atol=0.02, rtol=0.1)


def test_shapes_that_the_caller_lets_differ_are_drawn_anew(micro_lab: MicroLab, tmp_path):
    """An option of transformers that is asked for stays what it is."""
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    config(vocab_size=50)(folder)
    assert load_model(folder, ignore_mismatched_sizes=True).lm_head.weight.shape[0] == 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    path = tmp_path_factory.mktemp("gguf") / "micro.gguf"
    write_gguf(make_llama(seed=1), path)
    return path.read_bytes()


# by name: what is made of the file's bytes, what the message says
GGUF = {
    "cut in its keys": (lambda data: data[:1000], "is cut short or damaged"),
    "cut in its weights": (lambda data: data[: len(data) // 2], r"is cut short or damaged"),
    "without its last bytes": (lambda data: data[:-50], "is cut short or damaged"),
    "cut after its first word": (lambda data: data[:10], "is cut short or damaged"),
    "empty": (lambda data: b"", "is no GGUF file"),
    "of a later version": (lambda data: data[:4] + b"\x63\0\0\0" + data[8:], "of version 99"),
    "of an architecture nobody knows": (
        lambda data: data.replace(b"llama", b"lzzma"),
        "architecture lzzma is not supported",
    ),
    "of another architecture": (
        lambda data: data.replace(b"llama", b"mamba"),
        "incomplete: 18 tensors",
    ),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_that_cannot_be_read_is_named(whole, tmp_path, name):
    make, words = GGUF[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(make(whole))
    loads = [load_model] if "incomplete" in words else [load_model, load_config, load_tokenizer]
    # The config and the tokenizer lie before the weights.
    for load in loads:
        with pytest.raises(DataError, match=words) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_tokens_that_do_not_fit_each_other_are_one_message(whole, tmp_path):
    """The reader of tokenizers raises a bare Exception."""
    write_gguf(make_llama(seed=1), tmp_path / "x.gguf", tokens=TOKENS[:-5])
    with pytest.raises(DataError, match=r"cannot load a tokenizer .*out of vocabulary"):
        load_tokenizer(tmp_path / "x.gguf")


def test_a_folder_with_the_name_of_a_file_is_told(tmp_path):
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(DataError, match=r"x.gguf is a folder: name the GGUF file in it"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("who", ["model_name_or_path", "teacher_model_name_or_path"])
def test_the_command_ends_with_one_line_and_leaves_nothing(
    micro_lab: MicroLab, tmp_path, capsys, who
):
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    cut(WEIGHTS, -50)(folder)
    path = write_config(micro_lab, tmp_path, **CPU | {who: str(folder)})
    assert cli.main(["train", "--config", str(path), "--quiet"]) == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error" in row]
    assert f"{folder / WEIGHTS}" in line and "is cut short or damaged" in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_may_be_its_vocabulary_alone(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "plus", "one"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path).convert_tokens_to_ids(["one", "plus"]) == [6, 5]


def test_a_model_that_reads_images_is_told_with_what_to_do(tmp_path):
    """transformers lists some two hundred classes that it would take."""
    about = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"Qwen2_5_VL is no causal language model .*teacher_url\)$"):
        load_model(tmp_path)
