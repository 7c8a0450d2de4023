"""The gradient window against full forwards, and against its own definition by hooks that detach."""

import pytest
import torch
from sparse_cases import (
    FAMILIES,
    LENGTH,
    VOCAB,
    active_by_definition,
    make_family,
    padded_batch,
    windowed_by_definition,
)
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.models.gradient_window import (
    backbone_of,
    capture_prefix,
    compare_gradients,
    gradient_positions,
    gradients_of,
    sparse_states,
)

IDS, MASK, WANTED = padded_batch()


def relative_error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach(), truth.detach()
    assert truth.norm() > 0, "vacuous"
    return float((found - truth).norm() / truth.norm())


def loss_of(hidden: Tensor, model) -> Tensor:
    """A loss in which head and every wanted state take part, each with another weight."""
    head = model.get_output_embeddings().weight.to(hidden.dtype)
    logprobs = (hidden @ head.T).float().log_softmax(-1)
    targets = torch.arange(len(hidden)) % VOCAB
    weights = 1.0 + torch.arange(len(hidden))
    return -(logprobs.gather(1, targets[:, None]).squeeze(1) * weights).sum()


def gradients(loss: Tensor, model) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def windowed(model, window: int, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    states = sparse_states(model, IDS, MASK, WANTED, window=window, **settings)
    loss = loss_of(states.hidden, model)
    return loss.detach(), gradients(loss, model)


def full(model, active: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of a full forward; with `active`, by the definition of the window."""
    backbone = backbone_of(model)
    if active is None:
        # Counted from the first real token, as in generation.
        positions = (MASK.cumsum(1) - 1).clamp_min(0)
        hidden = backbone(
            input_ids=IDS, attention_mask=MASK, position_ids=positions
        ).last_hidden_state
    else:
        hidden = windowed_by_definition(backbone, IDS, MASK, active)
    loss = loss_of(hidden[WANTED], model)
    return loss.detach(), gradients(loss, model)


def assert_same_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float):
    whole = sum(float(g.norm()) ** 2 for g in truth.values()) ** 0.5
    assert whole > 0, "vacuous"
    for name, gradient in truth.items():
        # A key's bias moves all scores of a query alike: its gradient is rounding, so it has a floor.
        error = float((found[name] - gradient).norm())
        assert error < limit * max(float(gradient.norm()), 1e-4 * whole), name
    assert all(float(found[name].norm()) == 0 for name in found.keys() - truth.keys())


@pytest.mark.parametrize("window", [0, 1, 4, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_the_definition(family, window):
    """Oracle: a full forward with autograd that detaches, in every layer, what is not active."""
    model = make_family(family)
    loss, found = windowed(model, window)
    expected, truth = full(model, active_by_definition(WANTED, MASK, window))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, truth, 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_sequence_is_exact(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers runs Gemma 2 in eager only: sdpa has no soft cap")
    model = make_family(family, attention)
    loss, found = windowed(model, LENGTH)
    expected, truth = full(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, truth, 1e-5)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["qwen3_sliding", "gemma3"])
def test_float64_to_rounding(family):
    # Not eager: transformers adds finfo.min to scores, which overflows in float64 at padding.
    model = make_family(family, "sdpa", dtype=torch.float64)
    loss, found = windowed(model, 4)
    expected, truth = full(model, active_by_definition(WANTED, MASK, 4))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # The loss is taken in float32.
    assert_same_gradients(found, truth, 1e-6)


def test_many_blocks_equal_one(monkeypatch):
    model = make_family("qwen3_sliding")
    one = windowed(model, 9)
    monkeypatch.setattr("taopd.models.gradient_window.positions.BLOCK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr("taopd.models.gradient_window.positions.MIN_BLOCK", 3)
    many = windowed(model, 9)
    assert many[0].item() == pytest.approx(one[0].item(), rel=1e-6)
    assert_same_gradients(many[1], one[1], 1e-5)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_gradient_positions_equal_the_definition(window):
    found = gradient_positions(WANTED, MASK.bool(), window)
    assert torch.equal(found, active_by_definition(WANTED, MASK, window))


def test_share_counts_active_over_valid_positions_up_to_the_last_column():
    model = make_family("qwen3")
    states = sparse_states(model, IDS, MASK, WANTED, window=2)
    assert states.gradient_tokens == int(active_by_definition(WANTED, MASK, 2).sum()) == 16
    assert states.valid_tokens == int(MASK.sum()) == 4 * LENGTH - 12
    assert states.share == pytest.approx(16 / 80)


def test_holes_and_padding_on_the_right():
    """Keys are whatever is valid, not a range of columns."""
    model = make_family("qwen3")
    mask = MASK.clone()
    mask[0, 6], mask[1, 22], mask[3, 14:] = 0, 0, 0
    states = sparse_states(model, IDS, mask, WANTED, window=3)
    hidden = backbone_of(model)(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert relative_error(states.hidden, hidden[WANTED]) < 1e-5


def test_nothing_wanted_still_runs_and_has_a_graph():
    model = make_family("qwen3")
    states = sparse_states(model, IDS, MASK, torch.zeros_like(WANTED), window=4)
    assert states.hidden.shape == (0, 16) and states.gradient_tokens == 0
    states.hidden.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain = windowed(make_family("qwen3").train(), 4)
    model = make_family("qwen3").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpoint = model.model.layers[0]._gradient_checkpointing_func
    states = sparse_states(model, IDS, MASK, WANTED, window=4)
    loss = loss_of(states.hidden, model)
    loss.backward()
    assert loss.item() == plain[0].item()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, plain[1], 1e-6)
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func is checkpoint


def lora(model, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("window", [4, LENGTH])
def test_lora(window):
    model = lora(make_family("qwen3"))
    loss, found = windowed(model, window)
    expected, truth = full(model, active_by_definition(WANTED, MASK, window))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.keys() == truth.keys() and all("lora_" in name for name in found)
    assert_same_gradients(found, truth, 1e-5)


def test_lora_dropout_trains():
    _, found = windowed(lora(make_family("qwen3"), dropout=0.2).train(), 4)
    assert all(g.isfinite().all() for g in found.values())


def test_bf16_autocast_is_as_near_to_float32_as_the_full_forward():
    model = make_family("qwen3", "sdpa")
    active = active_by_definition(WANTED, MASK, 4)
    truth = full(model, active)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = windowed(model, 4), full(model, active)
    assert found[0].item() == pytest.approx(truth[0].item(), rel=0.03)
    error, base = (
        sum(float((g[name] - truth[1][name]).norm()) ** 2 for name in g) ** 0.5
        for g in (found[1], plain[1])
    )
    print(f"windowed {error:.2e} plain {base:.2e}")
    assert error < 1.5 * base
    assert all(g.dtype == torch.float32 for g in found[1].values())


def test_gradients_accumulate():
    model = make_family("qwen3")
    for rows in (slice(0, 2), slice(2, 4)):
        states = sparse_states(model, IDS[rows], MASK[rows], WANTED[rows], window=4)
        states.hidden.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    states = sparse_states(model, IDS, MASK, WANTED, window=4)
    assert_same_gradients(found, gradients(states.hidden.square().sum(), model), 1e-5)


def test_a_prefix_of_more_rows_and_columns_serves():
    """The scoring pass covers the whole batch; training reads the rows and columns that it needs."""
    model = make_family("qwen3", "sdpa")
    prefix = capture_prefix(model, IDS, MASK)
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    rows = torch.tensor([1, 3])
    columns = slice(0, 22)
    cut = [tensor[rows, columns] for tensor in (IDS, MASK, WANTED)]
    own = sparse_states(model, *cut, window=4)
    given = sparse_states(model, *cut, window=4, prefix=prefix.part(rows, columns))
    assert relative_error(given.hidden, own.hidden) < 1e-5
    given.hidden.sum().backward()
    after = (*prefix.keys, *prefix.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "read-only"
    shifted = prefix.part(torch.tensor([0]), slice(4, None))
    assert (
        shifted.positions[0, 0] == prefix.positions[0, 4] and shifted.num_bytes < prefix.num_bytes
    )
    only = sparse_states(model, IDS[:1, 4:], MASK[:1, 4:], WANTED[:1, 4:], window=2, prefix=shifted)
    assert relative_error(only.hidden, prefix.hidden[:1][WANTED[:1]]) < 1e-5
    with pytest.raises(ShapeError, match=r"covers \(4, 23\) positions, the input has \(2, 22\)"):
        sparse_states(model, *cut, window=4, prefix=prefix)


def test_fidelity_is_that_of_flattened_gradients_and_leaves_grad_alone():
    model = make_family("qwen3_tied")
    marker = torch.full_like(model.model.norm.weight, 7.0)
    model.model.norm.weight.grad = marker.clone()

    def exact() -> Tensor:
        hidden = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        return loss_of(hidden[WANTED], model)

    def sparse(window: int):
        states = sparse_states(model, IDS, MASK, WANTED, window=window)
        return loss_of(states.hidden, model)

    truth, found = full(model)[1], windowed(model, 2)[1]
    flat = [torch.cat([g[name].flatten() for name in truth]).double() for g in (truth, found)]
    expected = gradients_of(exact(), model)
    fidelity = compare_gradients(expected, gradients_of(sparse(2), model))
    assert fidelity.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
    assert fidelity.norm_ratio == pytest.approx(float(flat[1].norm() / flat[0].norm()), rel=1e-5)
    whole = compare_gradients(expected, gradients_of(sparse(LENGTH), model))
    assert whole == pytest.approx((1.0, 1.0), abs=1e-5)
    assert torch.equal(model.model.norm.weight.grad, marker)
    assert all(p.grad is None for p in model.parameters() if p is not model.model.norm.weight)


def test_what_is_not_plain_causal_attention_is_refused_by_name():
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        FalconConfig,
        FalconForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
        Llama4ForCausalLM,
        Llama4TextConfig,
        MambaConfig,
        MambaForCausalLM,
        MptConfig,
        MptForCausalLM,
    )

    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    cases = [
        (MambaForCausalLM(MambaConfig(**small)), "MambaModel has layers of type linear_attention"),
        (
            Llama4ForCausalLM(
                Llama4TextConfig(**small, **heads, **experts, intermediate_size_mlp=16)
            ),
            "Llama4TextModel has layers of type chunked_attention",
        ),
        (GptOssForCausalLM(GptOssConfig(**small, **heads, **experts)), "adds 's_aux'"),
        (
            FalconForCausalLM(FalconConfig(**small, num_attention_heads=2)),
            "FalconModel has attention",
        ),
        (
            MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=16, n_heads=2, n_layers=2)),
            "MptModel",
        ),
        (
            DeepseekV3ForCausalLM(
                DeepseekV3Config(
                    **small,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    kv_lora_rank=8,
                    q_lora_rank=8,
                    qk_rope_head_dim=4,
                    qk_nope_head_dim=4,
                    v_head_dim=4,
                    intermediate_size=16,
                    first_k_dense_replace=2,
                )
            ),
            "DeepseekV3Attention",
        ),
    ]
    for model, message in cases:
        with pytest.raises(ConfigError, match=message):
            sparse_states(model, IDS, MASK, WANTED, window=1)
    dropping = make_family("qwen3").train()
    dropping.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"attention_dropout, attn_pdrop\) to 0"):
        sparse_states(dropping, IDS, MASK, WANTED, window=1)
    with pytest.raises(ConfigError, match="gradient_window=-1"):
        sparse_states(make_family("qwen3"), IDS, MASK, WANTED, window=-1)


def test_a_difference_from_the_full_forward_is_an_error():
    """The guard against layers that mix positions behind our back, and against a stale prefix."""
    model = make_family("qwen3")
    prefix = capture_prefix(model, IDS, MASK)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ConfigError, match=r"Qwen3Model's hidden states differ by .* other weights"):
        sparse_states(model, IDS, MASK, WANTED, window=1, prefix=prefix)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinite hidden states"):
        sparse_states(model, IDS, MASK, WANTED, window=1)
