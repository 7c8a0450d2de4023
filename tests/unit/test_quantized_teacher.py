"""A teacher in 8 or 4 bits. Oracles: rounding from its definition, and the tensors that exist."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from taopd.errors import ConfigError
from taopd.models import quantization
from taopd.models.loading import load_model
from taopd.teachers import load_teacher
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.cost import ModelShape, PlanSettings
from taopd.trainer.cost.memory import step_memory
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import WORDS, make_tokenizer
from tests.e2e.test_trainer import CPU, OURS

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="the package bitsandbytes is not installed",
)
IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of a teacher whose layers are wide enough for a CPU's kernel."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        for weight in model.parameters():
            weight.data *= 4.0 if weight.ndim == 2 else 1.0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logprobs(model):
    return model.eval()(IDS).logits.double().log_softmax(-1)


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


@installed
@pytest.mark.parametrize(("kind", "levels"), [("8bit", 127), ("4bit", 7)])
def test_it_is_near_the_full_teacher_and_the_plan_counts_its_bytes(wide, micro_lab, kind, levels):
    student = load_model(micro_lab.student)
    full, _ = load_teacher(str(wide), student, make_tokenizer())
    packed, shared = load_teacher(str(wide), student, make_tokenizer(), quantization=kind)
    assert quantization.quantized_kind(packed) == kind and shared == len(WORDS)
    assert quantization.quantized_kind(full) is None
    assert not any(weight.requires_grad for weight in packed.parameters())
    size = held(packed)
    error = divergence(logprobs(full), logprobs(packed))
    # The same layers rounded to evenly spaced levels, a scale for each row.
    rounded, _ = load_teacher(str(wide), student, make_tokenizer())
    for name, weight in rounded.named_parameters():
        if "proj" in name:
            step = weight.abs().amax(1, keepdim=True) / levels
            weight.data = (weight / step).round() * step
    assert 0.0 < error < 4 * divergence(logprobs(full), logprobs(rounded)) + 1e-4
    shape = ModelShape.from_config(full.config)
    settings = PlanSettings(
        batch=1,
        prompt_length=8,
        completion_length=8,
        teacher_dtype="float32",
        teacher_quantization=kind,
    )
    planned = step_memory(shape, shape, settings).parts["teacher_weights"]
    assert planned == pytest.approx(size, rel=0.02)
    assert planned < 0.6 * held(full)


def held(model):
    """Bytes of the weights and their scales."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        for name in ("SCB", "absmax"):
            scale = getattr(weight, name, None)
            scale = getattr(getattr(weight, "quant_state", None), name, scale)
            total += 0 if scale is None else scale.numel() * scale.element_size()
    return total


@installed
@pytest.mark.parametrize("kind", quantization.QUANTIZATIONS)
def test_a_run_trains_with_it(wide, micro_lab, tmp_path, kind):
    from taopd.models.prompts import load_prompts

    settings = CPU | OURS | {"per_device_train_batch_size": 4, "max_steps": 2, "budget": 0.3}
    trainer = TeachabilityTrainer(
        model=str(micro_lab.student),
        args=TeachabilityConfig(
            output_dir=str(tmp_path),
            teacher_model_name_or_path=str(wide),
            teacher_quantization=kind,
            **settings,
        ),
        train_dataset=load_prompts(str(micro_lab.prompts), split="train"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0.0 < loss < 20.0 for loss in losses)


@installed
def test_layers_that_a_cpu_cannot_compute_in_4_bits_are_named(micro_lab):
    student = load_model(micro_lab.student)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has 16 and 32"):
        load_teacher(str(micro_lab.teacher), student, make_tokenizer(), quantization="4bit")


@installed
def test_its_import_fetches_no_kernels(tmp_path):
    """In a process of its own: it is imported once."""
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*names, **_):\n    print('fetched', names)\n"
    )
    program = (
        "import kernels, sys\n"
        "from taopd.models.quantization import quantization_config\n"
        "quantization_config('8bit', 'float32')\n"
        "assert sys.modules['kernels'] is kernels\n"
        "print(*sorted(name for name in sys.modules if name == 'bitsandbytes'))\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.split() == ["bitsandbytes"], done.stderr


def test_the_missing_package_is_named(micro_lab, monkeypatch):
    student = load_model(micro_lab.student)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is not installed"):
        load_teacher(str(micro_lab.teacher), student, make_tokenizer(), quantization="8bit")


def test_a_teacher_that_is_loaded_already_is_not_quantized(micro_lab):
    student, teacher = (load_model(path) for path in (micro_lab.student, micro_lab.teacher))
    with pytest.raises(ConfigError, match="the teacher is loaded already, and not so"):
        load_teacher(teacher, student, make_tokenizer(), quantization="8bit")
