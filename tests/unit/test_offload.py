"""A teacher in host memory. Oracles: the same model as it was, and the tensors that exist.

On a CPU the "device" is the same memory: packing, slots, hooks and what is copied are those of a GPU, streams
and pinned memory are not. The run on a GPU is marked so.
"""

import copy
import gc
import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from taopd.errors import ConfigError
from taopd.models.offload import LayerOffload, layers_of
from taopd.models.output_head import read_head
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.cost import ModelShape, PlanSettings
from taopd.trainer.cost.memory import step_memory
from tests.conftest import make_model
from tests.e2e.test_trainer import CPU, make_trainer

IDS = torch.arange(4, 24).reshape(2, 10)


def qwen(**sizes):
    return make_model(**{"seed": 3, "hidden_size": 32, "layers": 5} | sizes).eval()


def gpt2():
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def bytes_of(tensors):
    return sum(one.numel() * one.element_size() for one in tensors)


@pytest.mark.parametrize("make", [qwen, gpt2, lambda: qwen(layers=1), lambda: qwen().bfloat16()])
def test_the_numbers_are_those_of_the_model_on_the_device(make):
    model = make()
    expected, plain = logits(model), copy.deepcopy(model)
    moved = LayerOffload(model, "cpu")
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert torch.equal(read_head(model, 40).weight, read_head(plain, 40).weight)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    # Once a pass each, packed with little padding.
    assert moved.copied_bytes == 2 * moved.layer_bytes
    layers = bytes_of(weight for layer in layers_of(plain) for weight in layer.parameters())
    assert layers <= moved.layer_bytes < layers + 256 * len(list(model.parameters()))


def test_a_layer_computes_from_a_slot_and_at_most_two_are_there():
    model = qwen()
    moved = LayerOffload(model, "cpu")
    seen = []

    def look(layer, *_):
        number = [one is layer for one in layers_of(model)].index(True)
        rooms = {slot.room.data_ptr(): slot.room.numel() for slot in moved._slots}
        for weight in layer.parameters():
            start = next(p for p, size in rooms.items() if p <= weight.data_ptr() < p + size)
            assert weight.data_ptr() + bytes_of([weight]) <= start + rooms[start]
        others = [
            w for i, one in enumerate(layers_of(model)) for w in one.parameters() if i != number
        ]
        assert not any(p <= w.data_ptr() < p + n for w in others for p, n in rooms.items())
        seen.append((number, sum(rooms.values())))

    for layer in layers_of(model):
        layer.self_attn.register_forward_pre_hook(lambda _m, _a, layer=layer: look(layer))
    logits(model)
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert {size for _, size in seen} == {moved.slot_bytes}
    assert moved._slots is None


def test_a_pass_that_breaks_off_leaves_the_next_one_right():
    model = qwen()
    expected = logits(model)
    LayerOffload(model, "cpu")
    handle = layers_of(model)[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)
    layers = layers_of(model)
    # Layers in another order than that of the list: what is needed is copied.
    model.model.layers = torch.nn.ModuleList([layers[i] for i in (0, 3, 1, 3, 4)])
    other = logits(model)
    again = qwen()
    again.model.layers = torch.nn.ModuleList([layers_of(again)[i] for i in (0, 3, 1, 3, 4)])
    assert torch.equal(other, logits(again))


def test_the_plan_counts_the_tensors_on_the_device():
    model = make_model(seed=0, hidden_size=64, layers=6)
    shape = ModelShape.from_config(model.config)
    settings = PlanSettings(
        batch=1,
        prompt_length=8,
        completion_length=8,
        teacher_dtype="float32",
        teacher_offload=True,
    )
    memory = step_memory(shape, shape, settings)
    inside = {id(weight) for layer in layers_of(model) for weight in layer.parameters()}
    stays = bytes_of(weight for weight in model.parameters() if id(weight) not in inside)
    moved = LayerOffload(model, "cpu")
    assert memory.parts["teacher_weights"] == stays
    assert memory.parts["teacher_layers"] == pytest.approx(moved.slot_bytes, rel=0.1)
    on_cpu = PlanSettings(**vars_of(settings) | {"device": "cpu"})
    assert step_memory(shape, shape, on_cpu).parts["teacher_layers"] == 0


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_on_a_cpu_it_is_accepted_and_said_to_have_no_effect(micro_lab, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="taopd")
    trainer = make_trainer(micro_lab, tmp_path, teacher_offload="cpu")
    assert trainer.teacher_source().offload is None
    trainer.train()
    assert caplog.text.count("teacher_offload has no effect") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_offload": "disk"}, "'disk' is unknown"),
        ({"teacher_offload": "cpu", "teacher_url": "http://x"}, "about a teacher in this process"),
        (
            {"teacher_offload": "cpu", "teacher_model_name_or_path": "self"},
            "the student is its own teacher",
        ),
        ({"teacher_offload": "cpu", "teacher_quantization": "8bit"}, "one of them"),
        ({"teacher_quantization": "3bit"}, "'3bit' is unknown"),
        (
            {
                "teacher_quantization": "4bit",
                "teacher_model_init_kwargs": {"quantization_config": {}},
            },
            "keep one of them",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, words, tmp_path):
    remote = {"loss": "sampled_reverse_kl"} if "teacher_url" in settings else {}
    with pytest.raises(ConfigError, match=words):
        TeachabilityConfig(output_dir=str(tmp_path), **CPU, **settings, **remote)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        LayerOffload(torch.nn.Linear(2, 2), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_numbers_are_the_same_and_the_peak_is_two_layers():
    ids = torch.randint(4, 4000, (4, 64), device="cuda")
    sizes = {"hidden_size": 1024, "vocab_size": 4096, "layers": 12}
    model = qwen(**sizes)
    whole = copy.deepcopy(model).to("cuda")
    expected = logits(whole, ids)
    del whole
    gc.collect()
    moved = LayerOffload(model, "cuda")
    logits(model, ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = [logits(model, ids) for _ in range(3)]
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found)
    peak = torch.cuda.max_memory_allocated() - before
    activations = 64 * 2**20
    assert moved.slot_bytes <= peak < moved.slot_bytes + activations < moved.layer_bytes
    del found
    assert torch.cuda.memory_allocated() <= before


def test_the_plan_counts_with_the_same_slots_and_blocks():
    from taopd.models import offload, quantization
    from taopd.trainer.cost import teacher_weights

    assert (teacher_weights.SLOTS, teacher_weights.BLOCK) == (offload.SLOTS, quantization.BLOCK)
