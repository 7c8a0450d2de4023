"""Checkpoints that a quantization has packed: read as the plain ones are, or refused by its name.

Oracles: the checkpoint before it was packed; layouts of ModelOpt, ExLlama, MLX and GPTQ, made by hand.
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from taopd.errors import DataError
from taopd.models.loaded_weights import check_weights
from taopd.models.loading import load_model
from tests.conftest import MicroLab
from tests.unit.test_damaged_models import FP8, WEIGHTS, config, scaled, tensors, written

MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
MLX = {"group_size": 64, "bits": 4}


def layers(change):
    """A change of weights that packs every linear layer but the head: `change` gives its tensors by name."""

    def pack(held):
        plain = {name: value for name, value in held.items() if "_proj." not in name}
        for name in held.keys() - plain.keys():
            layer = name.removesuffix(".weight")
            plain |= {f"{layer}.{part}": value for part, value in change(*held[name].shape).items()}
        return plain

    return tensors(pack)


def halves(rows, columns):
    """NVFP4: two numbers a byte, a scale for 16 of them."""
    scales = {"weight_scale": torch.ones(rows, 1).to(FP8), "weight_scale_2": torch.ones(())}
    return {"weight": torch.zeros(rows, columns // 2, dtype=torch.uint8)} | scales


def words(rows, columns):
    """MLX: eight numbers of 4 bits a word."""
    scales = {"scales": torch.ones(rows, 1), "biases": torch.ones(rows, 1)}
    return {"weight": torch.zeros(rows, columns // 8, dtype=torch.int32)} | scales


def trellis(rows, columns):
    """ExLlama 3: no tensor of the plain name."""
    signs = {"suh": torch.ones(columns), "svh": torch.ones(rows)}
    return {"trellis": torch.zeros(1, 1, 48, dtype=torch.int16)} | signs


def columns_of_words(rows, columns):
    """GPTQ, as older tools write it, with a file of its own beside config.json."""
    places = {"g_idx": torch.zeros(columns), "scales": torch.ones(1, rows)}
    return {"qweight": torch.zeros(columns // 8, rows, dtype=torch.int32)} | places


def about(**words):
    return config(quantization_config=words)


# by name: what is done to the folder, what the message says
PACKED = {
    "NVFP4": (
        [layers(halves), about(quant_method="modelopt", quant_algo="NVFP4")],
        r"hold \S+weight_scale and 27 like it: they are packed by modelopt \(NVFP4\) .* in 16 bits",
    ),
    "NVFP4, told in a file of its own": (
        [layers(halves), written("hf_quant_config.json", json.dumps(MODELOPT))],
        r"packed by modelopt \(NVFP4\)",
    ),
    "FP8 of ModelOpt": (
        [tensors(scaled), about(quant_method="modelopt", quant_algo="FP8")],
        r"packed by modelopt \(FP8\)",
    ),
    "exl3": (
        [layers(trellis), about(quant_method="exl3", bits=4.0)],
        r"hold \S+suh and 41 like it: they are packed by exl3 \(4.0 bits\)",
    ),
    "MLX": (
        [layers(words), about(**MLX)],
        "quantization_config names no quant_method, as MLX writes it: .* in 16 bits, or serve",
    ),
    "MLX, under its other name": (
        [layers(words), config(quantization=MLX)],
        r"packed by a quantization that no config names \(4 bits\)",
    ),
    "GPTQ that config.json does not tell": (
        [layers(columns_of_words)],
        "hold .* packed by a quantization that no config names in a form",
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_what_transformers_does_not_unpack_is_refused_by_name(micro_lab: MicroLab, tmp_path, name):
    changes, message = PACKED[name]
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    for change in changes:
        change(folder)
    with pytest.raises(DataError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_name_alone_is_no_packing(micro_lab: MicroLab, tmp_path):
    """Unpacked weights may keep the config that they had; an incomplete folder is told as one."""
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    about(quant_method="modelopt", quant_algo="FP8")(folder)
    assert torch.equal(
        load_model(folder).lm_head.weight, load_file(folder / WEIGHTS)["lm_head.weight"]
    )
    tensors(lambda held: {f"_orig_mod.{name}": value for name, value in held.items()})(folder)
    with pytest.raises(DataError, match=r"are incomplete: \d+ tensors are missing"):
        load_model(folder)


def test_scales_are_not_passed_over_where_the_model_is_quantized_as_it_is_loaded(
    micro_lab: MicroLab, tmp_path
):
    """With `teacher_quantization` the packed numbers would be quantized again, without their scales."""
    folder = tmp_path / "model"
    shutil.copytree(micro_lab.student, folder)
    model = load_model(folder)
    about(quant_method="modelopt", quant_algo="FP8")(folder)
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    report = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": [scale]}
    model.is_quantized, model.hf_quantizer = True, type("Loader", (), {"pre_quantized": False})
    with pytest.raises(DataError, match=r"hold \S+up_proj.weight_scale: .* by modelopt \(FP8\)"):
        check_weights(str(folder), model, report, any_shape=False)
    model.hf_quantizer.pre_quantized = True
    check_weights(str(folder), model, report, any_shape=False)


def router_in_float32():
    """A micro model of a family that keeps its router in float32 beside 16 bits."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.Ernie4_5_MoeForCausalLM(
        transformers.Ernie4_5_MoeConfig(**sizes, **heads, **experts, **ends)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in FP8")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_unpacked_has_the_dtypes_of_a_plain_checkpoint(
    micro_lab: MicroLab, tmp_path, dtype, kept
):
    """Norms, head and embedding stand in float32 beside FP8."""
    plain, folder, ids = tmp_path / "plain", tmp_path / "packed", torch.tensor([[5, 6, 7, 8]])
    (router_in_float32() if kept else load_model(micro_lab.student)).save_pretrained(plain)
    shutil.copytree(plain, folder)
    held = scaled(load_file(folder / WEIGHTS))
    scales = [name for name in held if name.endswith("_scale")]
    held |= {f"{name}_inv": held.pop(name).reshape(1, 1) for name in scales}
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    about(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])(folder)
    expected, found = load_model(plain, dtype=dtype), load_model(folder, dtype=dtype)
    wanted = {name: weight.dtype for name, weight in expected.named_parameters()}
    assert {name: weight.dtype for name, weight in found.named_parameters()} == wanted
    assert (len(set(wanted.values())) == 2) == (kept and dtype != "float32"), "vacuous"
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=0.05, rtol=0.1)
