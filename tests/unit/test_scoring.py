"""Positions, trimming and heads against the plain model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from taopd.models.batch import Positions, trim
from taopd.models.output_head import read_head


def padded_batch(seed: int, num_rows: int = 4):
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 5, (num_rows,), generator=generator)
    lengths = torch.randint(1, 7, (num_rows,), generator=generator)
    prompt_mask = torch.arange(6) >= 6 - prompt_lengths[:, None]
    completion_mask = torch.arange(8) < lengths[:, None]
    return {
        "prompt_ids": torch.randint(4, 40, (num_rows, 6), generator=generator),
        "prompt_mask": prompt_mask.long(),
        "completion_ids": torch.randint(4, 40, (num_rows, 8), generator=generator),
        "completion_mask": completion_mask.long(),
    }


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_trim_keeps_every_active_position_and_its_context(seed, share):
    batch = padded_batch(seed)
    draw = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed)) < share
    active = draw & batch["completion_mask"].bool()
    part = trim(batch, active)
    for row, source in enumerate(part.rows.tolist()):
        tokens = part.input_ids[row][part.attention_mask[row].bool()].tolist()
        prompt = batch["prompt_ids"][source][batch["prompt_mask"][source].bool()].tolist()
        completion = batch["completion_ids"][source][
            batch["completion_mask"][source].bool()
        ].tolist()
        assert tokens == prompt + completion[: part.num_completion]
    assert active[part.rows, : part.num_completion].sum() == active.sum()
    if active.any():
        assert active[:, part.num_completion - 1].any(), "a column after the last active one stayed"
        assert active[part.rows].any(1).all(), "a row without an active position stayed"
    else:
        assert part.input_ids.shape[0] == 1 and part.num_completion == 1


def test_positions_round_trip():
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    positions = Positions.of(mask)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert positions.spread(values).tolist() == [[1, 0, 2], [0, 0, 0], [3, 4, 0]]
    chosen = torch.tensor([False, True, True, True])
    assert [part.tolist() for part in positions.by_row(values, chosen)] == [[2.0], [], [3.0, 4.0]]
    assert positions.describe(3, first_row=10, when="step 2") == (
        "step 2, completion 12 of the batch, position 1"
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_read_head_gives_the_models_own_logits(micro_lab, temperature):
    model = AutoModelForCausalLM.from_pretrained(micro_lab.student, dtype=torch.float32)
    ids = torch.arange(4, 14)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    expected = (model(input_ids=ids).logits[0, :, :30] / temperature).log_softmax(-1)
    torch.testing.assert_close(read_head(model, 30).logprobs(hidden, temperature), expected)


def test_read_head_divides_where_the_family_divides():
    """Granite's forward divides its logits by `logits_scaling`."""
    config = GraniteConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
    )
    model = GraniteForCausalLM(config).eval()
    ids = torch.arange(5)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    expected = model(input_ids=ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(read_head(model, 20).logprobs(hidden, 1.0), expected)
