"""Signal tables: the moving average, the compatibility proxies, and what a table refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from taopd.errors import ConfigError, NumericsError, ShapeError
from taopd.signals import (
    COMPATIBILITIES,
    SignalTable,
    compatibility_proxy,
    prefix_ema,
    signal_table,
    topk_lists_signals,
)


def ema_by_definition(values, completion, decay):
    averages = []
    for row, value in enumerate(values):
        if row == 0 or completion[row] != completion[row - 1]:
            averages.append(value)
        else:
            averages.append(decay * averages[-1] + (1 - decay) * value)
    return averages


def small_signals(num_rows=5):
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(num_rows, 6, generator=generator).argsort(1)
    values = -torch.rand(num_rows, 8, generator=generator, dtype=torch.float64) * 4
    return topk_lists_signals(ids[:, :4], values[:, :4], ids[:, 2:], values[:, 4:], k=4)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), max_size=6),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_r7_prefix_ema_matches_the_recursion_and_resets_per_response(responses, decay):
    values = [value for one in responses for value in one]
    completion = [number for number, one in enumerate(responses) for _ in one]
    ours = prefix_ema(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(completion, dtype=torch.int64),
        decay=decay,
    )
    assert ours.tolist() == ema_by_definition(values, completion, decay)


def test_r7_prefix_ema_runs_over_masked_rows():
    """It takes no mask at all: a masked row moves the average like any other."""
    ours = prefix_ema(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 0]))
    assert_close(ours, torch.tensor([1.0, 0.9, 0.91]))


def test_every_proxy_is_the_column_it_names():
    signals, completion = small_signals(), torch.zeros(5, dtype=torch.int64)
    expected = {
        "mass": signals.compatibility,
        "bound": signals.compatibility_bound,
        "set": signals.overlap,
        "bc": signals.bhattacharyya,
        "jaccard": signals.jaccard,
        "prefix_ema": prefix_ema(signals.compatibility, completion),
        "reach": torch.linspace(0, 1, 5),
    }
    signals = replace(signals, reach=expected["reach"])
    assert set(expected) == set(COMPATIBILITIES)
    for name, column in expected.items():
        assert_close(compatibility_proxy(signals, name, completion), column)


def test_an_unknown_proxy_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="jaccard"):
        compatibility_proxy(small_signals(), "jacard", torch.zeros(5, dtype=torch.int64))


def test_signal_table_names_the_first_bad_row_and_forgives_masked_ones():
    signals = small_signals()
    signals.disagreement[3] = torch.nan
    rows = {"completion": torch.tensor([0, 0, 0, 1, 1]), "position": torch.tensor([0, 1, 2, 0, 1])}
    with pytest.raises(NumericsError, match="completion 1, position 0"):
        signal_table(signals, **rows, valid=torch.ones(5, dtype=torch.bool))
    table = signal_table(signals, **rows, valid=torch.tensor([True, True, True, False, True]))
    assert len(table) == 5 and table.extra["teacher_entropy"].dtype == torch.float64


def test_a_column_of_another_length_is_an_error():
    column = torch.zeros(3, dtype=torch.float64)
    with pytest.raises((ShapeError, TypeError)):
        SignalTable(
            disagreement=column,
            compatibility=column,
            entropy=torch.zeros(2, dtype=torch.float64),
            completion=torch.zeros(3, dtype=torch.int64),
            position=torch.arange(3),
            valid=torch.ones(3, dtype=torch.bool),
        )
