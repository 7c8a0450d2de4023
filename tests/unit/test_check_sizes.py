"""How much of a batch `taopd check` looks at, and what one completion may say. Oracles: products by hand."""

from types import SimpleNamespace

import pytest
import torch

from taopd.preflight.probe import CPU_WORK, LEAST_COMPLETIONS, MOST_COMPLETIONS, _num_completions
from taopd.preflight.rollout_checks import check_truncation


def pair(width):
    """Two models of width^2 parameters, without memory."""
    return [torch.nn.Linear(width, width, bias=False, device="meta") for _ in range(2)]


@pytest.mark.parametrize(
    ("width", "tokens", "batch", "device", "expected"),
    [
        (100, 50, 8, "cpu", 8),
        (100, 50, 500, "cpu", MOST_COMPLETIONS),
        (11_600, 48, 16, "cpu", LEAST_COMPLETIONS),  # 135 M parameters each
        (11_600, 48, 16, "cuda", 16),
        (11_600, 48, 2, "cpu", 2),
        (5_000, 100, 32, "cpu", 10),
    ],
)
def test_a_large_pair_on_a_cpu_is_measured_on_fewer_completions(
    width, tokens, batch, device, expected
):
    accelerator = SimpleNamespace(device=torch.device(device))
    found = _num_completions(pair(width), tokens, batch, accelerator)
    assert found == expected
    if device == "cpu" and LEAST_COMPLETIONS < found < min(batch, MOST_COMPLETIONS):
        assert found * tokens * 2 * width**2 <= CPU_WORK < (found + 1) * tokens * 2 * width**2


@pytest.mark.parametrize(
    ("ended", "level"),
    [
        ([True] * 3 + [False], "pass"),
        ([True] * 2 + [False] * 2, "warn"),
        ([False], "warn"),
        ([True] * 30 + [False] * 2, "pass"),
        ([True] * 28 + [False] * 4, "warn"),
    ],
)
def test_a_single_cut_completion_of_few_is_no_warning(ended, level):
    measured = SimpleNamespace(ended=torch.tensor(ended), max_tokens=9)
    assert check_truncation(measured, max_completion_length=9).level == level
