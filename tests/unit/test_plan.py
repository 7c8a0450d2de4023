"""Plans. Oracles: real models built from the same configs (parameters on the meta device, FLOPs by
`torch.utils.flop_counter`, saved bytes by `saved_tensors_hooks`), published parameter counts, simulation.
"""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from taopd.errors import ConfigError, DataError
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.cost import SHAPES, ModelShape, PlanSettings, gradient_share, load_shape, plan
from taopd.trainer.cost.communication import step_communication
from taopd.trainer.cost.flops import (
    LOSS_LOGIT_FLOPS,
    SCORE_LOGIT_FLOPS,
    TRL_LOGIT_FLOPS,
    backward_flops,
    forward_flops,
    head_flops,
    step_cost,
)
from taopd.trainer.cost.memory import activation_bytes, step_memory
from taopd.trainer.cost.settings import BYTES, plan_settings
from taopd.trainer.settings_file import TrainSettings
from tests.conftest import make_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
    "qwen3-tied-bias": Qwen3Config(
        **SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True
    ),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=24),
    "mistral": MistralConfig(**SIZES),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        mlp_only_layers=[1],
    ),
}
PUBLISHED = {
    # From the checkpoints' safetensors metadata, a tied head counted once.
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen2.5-3B": 3_085_938_688,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
}
STUDENT = ModelShape.from_config(CONFIGS["qwen3"])
SETTINGS = PlanSettings(batch=2, prompt_length=16, completion_length=48)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_those_of_the_real_class(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    shape = ModelShape.from_config(CONFIGS[name])
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.embedding_parameters == model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.tied == tied


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_shapes_have_their_published_size(name):
    assert SHAPES[name].num_parameters == PUBLISHED[name]


def test_every_public_shape_is_checked():
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize(
    "targets",
    [
        *(None, "all-linear", ["o_proj"], ["mlp.up_proj", "k_proj"]),
        *(r".*layers\.\d+\.mlp\..*_proj", r".*layers\.[1-9]\.mlp\..*_proj", r".*\.0\..*v_proj"),
    ],
    ids=str,
)
def test_adapters_equal_those_of_peft(targets):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_config(CONFIGS["qwen3"]), LoraConfig(r=3, target_modules=targets)
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert STUDENT.adapter_parameters(3, targets) == trained
    settings = replace(SETTINGS, lora_rank=3, lora_targets=targets)
    assert step_memory(STUDENT, STUDENT, settings).parts["optimizer_states"] == 2 * 4 * trained


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied-bias", "qwen2", "llama", "mistral"])
def test_flops_equal_the_counter(name):
    """Eager attention: on the CPU the counter does not see sdpa."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    shape = ModelShape.from_config(CONFIGS[name])
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    with FlopCounterMode(display=False) as head:
        model.get_output_embeddings()(hidden.detach())
    assert forward.get_total_flops() == pytest.approx(forward_flops(shape, 64, 32), rel=0.02)
    assert backward.get_total_flops() == pytest.approx(backward_flops(shape, 64, 32), rel=0.02)
    assert head.get_total_flops() == pytest.approx(head_flops(shape, 300, 64), rel=0.02)


def test_loss_flops_equal_the_counter():
    """`head_loss` runs three student matmuls and one teacher matmul, as the stage says."""
    from taopd.kernels import Head
    from taopd.losses import Targets, head_loss, resolve_loss

    states = torch.randn(16, 64, requires_grad=True)
    weight = torch.randn(300, 64, requires_grad=True)
    targets = Targets(
        token_ids=torch.zeros(16, dtype=torch.long),
        teacher_hidden=torch.randn(16, 32),
        teacher_head=Head(weight=torch.randn(300, 32)),
    )
    with FlopCounterMode(display=False) as counter:
        loss, _ = head_loss(
            states, Head(weight=weight), torch.ones(16), targets, resolve_loss("reverse_kl")
        )
        loss.backward()
    settings = PlanSettings(batch=1, prompt_length=0, completion_length=16, budget=1.0)
    teacher = replace(STUDENT, hidden_size=32)
    cost = step_cost(STUDENT, teacher, settings, shared_forward=True)
    # The counter has no formula for `addmm_`, the gradient of the weight.
    counted = counter.get_total_flops() + head_flops(STUDENT, 300, 16)
    assert counted == pytest.approx(cost.loss_heads * 1e12, rel=0.02)


def saved_bytes(config, settings, *, checkpointing=False):
    """Bytes of distinct storages that the backbone's forward saves, parameters left out."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(getattr(torch, settings.student_dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(settings.batch, settings.length, dtype=torch.long)
    mask = torch.ones_like(ids)
    if settings.padded:
        mask[0, :3] = 0
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # Kept alive, so that no other tensor is given its address.
            found[storage.data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "student_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_activations_equal_what_autograd_saves(name, dtype, student_dtype, padded):
    settings = replace(SETTINGS, dtype=dtype, student_dtype=student_dtype, padded=padded)
    shape = ModelShape.from_config(CONFIGS[name])
    expected = saved_bytes(CONFIGS[name], settings)
    assert activation_bytes(shape, settings) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("dtype", "student_dtype"),
    [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_the_cache_equals_what_sampling_holds(name, dtype, student_dtype):
    """Autocast leaves the cache in the dtype of the weights."""
    student = ModelShape.from_config(CONFIGS[name])
    settings = PlanSettings(
        batch=2, prompt_length=5, completion_length=4, dtype=dtype, student_dtype=student_dtype
    )
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(getattr(torch, student_dtype))
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != student_dtype)
    with torch.no_grad(), autocast:
        prompt = torch.ones(2, 8, dtype=torch.long)
        cache = model(prompt, use_cache=True).past_key_values
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
    held = sum(kept.nbytes for layer in cache.layers for kept in (layer.keys, layer.values))
    assert step_memory(student, student, settings).parts["generation_cache"] == held


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    settings = replace(
        SETTINGS, dtype="float32", student_dtype="float32", gradient_checkpointing=True
    )
    kept = saved_bytes(CONFIGS["qwen3"], settings, checkpointing=True)
    one_layer = activation_bytes(replace(STUDENT, num_layers=1), settings)
    assert activation_bytes(STUDENT, settings) > kept
    assert activation_bytes(STUDENT, settings) < kept + one_layer


@pytest.mark.parametrize("window", [0, 3, 40])
def test_gradient_share_equals_a_simulation(window):
    settings = replace(SETTINGS, budget=0.1)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.zeros(20_000, settings.length, dtype=torch.bool)
    wanted[:, 15:63] = torch.rand(20_000, 48, generator=generator) < 0.1
    active = wanted.clone()
    for shift in range(1, window + 1):
        active[:, :-shift] |= wanted[:, shift:]
    expected = active.double().mean().item()
    assert gradient_share(settings, window) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("lengths", [(0, 1), (1, 1), (2, 30), (20, 7), (20, 30)])
@pytest.mark.parametrize("window", [0, 1, 6, 19, 20, 29, 30, 49, 60])
@pytest.mark.parametrize("budget", [1e-6, 0.1, 1.0])
def test_gradient_share_is_the_sum_over_columns(lengths, window, budget):
    settings = PlanSettings(
        batch=1, prompt_length=lengths[0], completion_length=lengths[1], budget=budget
    )
    first, last = max(0, lengths[0] - 1), sum(lengths) - 2
    reached = [
        sum(first <= column + ahead <= last for ahead in range(window + 1))
        for column in range(last + 1)
    ]
    expected = sum(1 - (1 - settings.wanted_share) ** count for count in reached) / sum(lengths)
    assert gradient_share(settings, window) == pytest.approx(expected, abs=1e-9)


def test_a_long_completion_is_planned_as_soon_as_a_short_one():
    """It took eight seconds at 131,072 tokens, and more than eight minutes at 10^8."""
    settings = PlanSettings(batch=1, prompt_length=256, completion_length=10**8)
    start = time.process_time()
    plan(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], settings)
    assert time.process_time() - start < 1


def test_gradient_share_away_from_the_borders_is_the_formula():
    settings = PlanSettings(batch=1, prompt_length=0, completion_length=100_000, budget=0.05)
    assert gradient_share(settings, 8) == pytest.approx(1 - 0.95**9, rel=1e-3)
    assert gradient_share(settings, None) == 1.0


def test_a_full_budget_without_window_costs_what_trl_costs():
    settings = replace(SETTINGS, budget=1.0)
    result = plan(STUDENT, STUDENT, settings)
    head = head_flops(STUDENT, 300, settings.num_completion_tokens) / 1e12
    pairs = settings.num_completion_tokens * 300
    passes = (TRL_LOGIT_FLOPS - SCORE_LOGIT_FLOPS - LOSS_LOGIT_FLOPS) * pairs / 1e12
    assert result.full_cost.total - result.cost.total == pytest.approx(passes)
    assert result.cost.loss_heads == pytest.approx(4 * head)


def test_ratios_fall_with_budget_and_rise_with_the_window():
    rows = plan(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], replace(SETTINGS, budget=0.05)).windows
    assert [row.window for row in rows] == [None, 0, 4, 8, 32]
    windowed = [row.update_ratio_one for row in rows[1:]]
    assert windowed == sorted(windowed) and windowed[-1] < 1.2
    assert all(row.update_ratio_one <= row.update_ratio_several for row in rows)
    fewer = plan(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], replace(SETTINGS, budget=0.01)).windows
    assert all(a.update_ratio_one < b.update_ratio_one for a, b in zip(fewer, rows, strict=True))


def test_memory_follows_the_settings():
    base = step_memory(STUDENT, STUDENT, SETTINGS).parts
    lora = step_memory(STUDENT, STUDENT, replace(SETTINGS, lora_rank=2, anchor_fraction=0.1)).parts
    anchored = step_memory(STUDENT, STUDENT, replace(SETTINGS, anchor_fraction=0.1)).parts
    window = step_memory(STUDENT, STUDENT, replace(SETTINGS, window=0)).parts
    assert lora["reference_weights"] == 0 == base["reference_weights"]
    assert anchored["reference_weights"] == base["student_weights"]
    assert lora["optimizer_states"] == 2 * 4 * STUDENT.adapter_parameters(2)
    half = replace(SETTINGS, lora_rank=2, student_dtype="bfloat16", num_ranks=2)
    adapters = 4 * STUDENT.adapter_parameters(2)  # which PEFT keeps in float32
    found = step_memory(STUDENT, STUDENT, half).parts
    assert found["student_weights"] == 2 * STUDENT.num_parameters + adapters
    assert found["gradients"] == found["gradient_buckets"] == adapters
    assert found["optimizer_states"] == 2 * adapters
    assert step_communication(STUDENT, STUDENT, half).moved["gradients"] == adapters
    assert base["key_value_prefix"] == 0 < window["key_value_prefix"]
    assert window["activations"] < base["activations"]
    assert base["optimizer_states"] == 2 * base["gradients"] == 8 * STUDENT.num_parameters


def test_what_is_sampled_and_scored_once_serves_several_steps():
    """A mean step on one generation batch: twice the batch's cost is once that of sampling and scoring."""
    settings = replace(SETTINGS, reach=True, anchor_fraction=0.1)
    one, two = (
        step_cost(STUDENT, STUDENT, replace(settings, num_iterations=n), shared_forward=False)
        for n in (1, 2)
    )
    for stage in ("sample", "score_student", "score_teacher", "score_heads"):
        assert 2 * getattr(two, stage) == pytest.approx(getattr(one, stage))
    for stage in ("train_forward", "train_backward", "loss_heads"):
        assert getattr(two, stage) == getattr(one, stage) > 0
    assert one.anchor / 2 < two.anchor < one.anchor
    assert one.logit_passes / 2 < two.logit_passes < one.logit_passes
    row = plan(STUDENT, STUDENT, replace(settings, num_iterations=2)).windows[0]
    assert row.update_ratio_one == row.update_ratio_several


def test_a_start_that_is_remembered_costs_its_share_of_a_forward():
    """On a quarter of the completions; both heads run there twice. A server's answer needs it on all."""
    whole = replace(SETTINGS, reach=True, anchor_fraction=0.1)
    quarter = replace(whole, anchor_responses=0.25)

    def anchor(settings):
        return step_cost(STUDENT, STUDENT, settings, shared_forward=True)

    forward = anchor(whole).score_student
    head = anchor(whole).score_heads / 2
    saved = anchor(whole).anchor - anchor(quarter).anchor
    assert saved == pytest.approx(0.75 * forward + (2.0 - 0.25 - 1.0 - 0.5) * head)
    elsewhere = [replace(each, teacher_elsewhere=True) for each in (whole, quarter)]
    assert anchor(elsewhere[0]).anchor == anchor(elsewhere[1]).anchor


def test_no_more_of_the_prefix_is_planned_than_a_run_holds():
    """`prefix_memory_mib` limits what the scoring pass leaves; the rest is computed again."""
    whole = PlanSettings(
        batch=2, prompt_length=500, completion_length=500, window=4, micro_batches=8
    )
    size = step_memory(STUDENT, STUDENT, whole).parts["key_value_prefix"] / 2**20

    def at(mib):
        settings = replace(whole, prefix_memory_mib=mib)
        memory = step_memory(STUDENT, STUDENT, settings)
        cost = step_cost(STUDENT, STUDENT, settings, shared_forward=False)
        return memory.parts["key_value_prefix"] / 2**20, cost.train_forward

    again = step_cost(STUDENT, STUDENT, replace(whole, keep_prefix=False), shared_forward=False)
    kept = step_cost(STUDENT, STUDENT, whole, shared_forward=False)
    assert size < 8192 and at(size + 1) == (size, kept.train_forward)
    half = round(size / 2)
    mid = kept.train_forward + (1 - half / size) * (again.train_forward - kept.train_forward)
    assert at(half) == (pytest.approx(half), pytest.approx(mid))
    assert at(0) == (pytest.approx(size / 8), again.train_forward)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"log_update_norm": False}, {"update_norm": False}),
        ({"log_update_norm": False, "match_update_norm": 1.0}, {"update_norm": True}),
        ({"log_update_norm": False, "max_update_norm": 1.0}, {"update_norm": True}),
        ({"gradient_window": 4}, {"keep_prefix": True, "prefix_memory_mib": 8192}),
        ({"gradient_window": 4, "prefix_memory_mib": 0}, {"keep_prefix": False}),
        (
            {"gradient_window": 4, "num_iterations": 2},
            {"keep_prefix": False, "num_iterations": 2, "shared_forward": False},
        ),
        (
            {"budget_schedule": "linear", "budget": 0.1, "budget_end": 0.5, "budget_steps": 9},
            {"budget": 0.5},
        ),
        (
            {"budget_schedule": "linear", "budget": 0.5, "budget_end": 0.1, "budget_steps": 9},
            {"budget": 0.5},
        ),
    ],
)
def test_a_plan_reads_of_the_settings_what_a_run_does(tmp_path, given, read):
    """As `UpdateNorm.of` and `StudentForward` decide; of a schedule the dearest step."""
    config = TeachabilityConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **given)
    found = plan_settings(TrainSettings.of_python(config))
    assert {name: getattr(found, name) for name in read} == read


def test_names_and_folders(tmp_path):
    make_model(seed=0).config.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in make_model(seed=0).parameters())
    assert load_shape(str(tmp_path)).num_parameters == expected
    assert load_shape("Qwen/Qwen3-4B") is SHAPES["Qwen3-4B"]
    with pytest.raises(ConfigError, match=r"built-in table: Qwen3-0\.6B"):
        load_shape("no/such")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        load_shape(str(tmp_path))


OTHERS = (
    *("gemma2", "gemma3_text", "phi", "phi3", "olmo2", "smollm3", "lfm2", "granite", "gpt_oss"),
    *(
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "gpt2",
        "gpt_neox",
        "cohere2",
        "falcon",
        "opt",
        "mixtral",
    ),
)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_planned_from_generic_fields(kind):
    """Oracle for the parameters: the real class. The plan is finite and counts every part."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    shape = ModelShape.from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert shape.hidden_size == model.get_output_embeddings().weight.shape[1]
    found = plan(shape, shape, replace(SETTINGS, window=None))
    assert found.memory.parts["activations"] > 0
    assert found.memory.peak > 4 * shape.num_parameters


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
UNUSUAL = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4} | EXPERTS,
    "mistral": {"sliding_window": 8},
    "deepseek_v2": LATENT | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 4},
    "deepseek_v3": LATENT | EXPERTS | {"num_key_value_heads": 4, "n_routed_experts": 4},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "mixtral": {"num_local_experts": 4} | EXPERTS,
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 40} | EXPERTS,
    "gpt_neox": {"num_key_value_heads": 4},
    "starcoder2": {},
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_cache_and_flops_of_other_layers_are_those_of_the_model(kind):
    """Compressed, shared and sliding caches, experts beside shared ones, feed-forwards without a gate."""
    config = AutoConfig.for_model(kind, **SIZES | UNUSUAL[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config._experts_implementation = "eager"  # The counter does not see the grouped matmul.
    shape = ModelShape.from_config(config)
    ids = torch.ones(2, 24, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.base_model(ids, use_cache=False)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    held = sum(kept.numel() for layer in cache.layers for kept in (layer.keys, layer.values))
    assert 2 * shape.cached_entries(24) == held
    assert forward_flops(shape, 2 * 24, 24) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_window_in_a_file_is_that_of_the_class(kind, changes, tmp_path):
    config = AutoConfig.for_model(kind, **SIZES | changes)
    written = config.to_dict() | changes
    written.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert load_shape(str(tmp_path)) == ModelShape.from_config(config, name=str(tmp_path))


def test_a_config_without_a_size_names_it():
    with pytest.raises(ConfigError, match=r"mine \(mamba\) does not say num_heads"):
        ModelShape.from_config(AutoConfig.for_model("mamba"), name="mine")


@pytest.mark.parametrize(
    "wrong", [{"budget": 0.0}, {"batch": 0}, {"window": -1}, {"dtype": "int8"}, {"lora_rank": 0}]
)
def test_settings_outside_their_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)


def test_ranks_divide_what_is_sharded_and_nothing_else():
    alone = step_memory(STUDENT, STUDENT, replace(SETTINGS, anchor_fraction=0.1)).parts
    many = replace(SETTINGS, anchor_fraction=0.1, num_ranks=8, sharding="fsdp2")
    sharded = step_memory(STUDENT, STUDENT, many).parts
    for name in ("student_weights", "gradients", "optimizer_states", "update_norm_copy"):
        assert sharded[name] == alone[name] / 8, name
    for name in ("teacher_weights", "reference_weights", "scoring_logits"):
        assert sharded[name] == alone[name], name
    assert 0 < sharded["gathered_weights"] < alone["student_weights"]
    zero3 = step_memory(STUDENT, STUDENT, replace(many, sharding="zero3")).parts
    for name in ("teacher_weights", "gradients"):
        assert zero3[name] == pytest.approx(alone[name] / 8), name
    dtypes = BYTES[SETTINGS.dtype] / BYTES[SETTINGS.student_dtype]
    assert zero3["reference_weights"] == alone["reference_weights"] * dtypes / 8
    ddp = step_memory(STUDENT, STUDENT, replace(many, sharding="ddp")).parts
    assert ddp["gradient_buckets"] == ddp["gradients"] == alone["gradients"]


@pytest.mark.parametrize(("sharding", "factor"), [("ddp", 2), ("fsdp2", 1), ("zero3", 1)])
def test_rings_send_all_but_the_own_part(sharding, factor):
    """Oracle: the ring algorithms, all-reduce as reduce-scatter and all-gather."""
    settings = replace(SETTINGS, num_ranks=8, sharding=sharding, gather_limit=0)
    volume = step_communication(STUDENT, STUDENT, settings)
    assert volume.sent["gradients"] == pytest.approx(factor * 7 / 8 * volume.moved["gradients"])
    assert volume.sent["parameters"] == pytest.approx(7 / 8 * volume.moved["parameters"])
    assert volume.moved["selection"] == 37 * 16 * 1024
    longer = replace(settings, completion_length=10 * settings.completion_length)
    assert (
        step_communication(STUDENT, STUDENT, longer).moved["selection"] == volume.moved["selection"]
    )
    rows = step_communication(STUDENT, STUDENT, replace(settings, gather_limit=10**7))
    assert rows.moved["selection"] == 20 * 8 * settings.num_completion_tokens
