"""Signal tables for the selector tests."""

import torch
from hypothesis import strategies as st

from taopd.signals import KNOWN_SIGNALS, SignalTable


def further_signals(num_rows, seed=0):
    """Every further signal a selector may read, with random values of the right sign."""
    generator = torch.Generator().manual_seed(1000 + seed)
    columns = {}
    for name in KNOWN_SIGNALS:
        draws = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        columns[name] = -3 * draws if name.endswith("_logprobs") else draws
    columns["student_top1_accepted"] = columns["student_top1_accepted"].round()
    return columns


def table_of(rows):
    """[(D, C, H, completion, position, valid), ...] -> SignalTable with all further signals."""
    columns = list(zip(*rows, strict=True)) or [()] * 6
    floats = [torch.tensor(column, dtype=torch.float64) for column in columns[:3]]
    integers = [torch.tensor(column, dtype=torch.int64) for column in columns[3:5]]
    return SignalTable(
        disagreement=floats[0],
        compatibility=floats[1],
        entropy=floats[2],
        completion=integers[0],
        position=integers[1],
        valid=torch.tensor(columns[5], dtype=torch.bool),
        extra=further_signals(len(rows)),
    )


def random_table(num_rows=200, num_responses=4, seed=0, masked=0.2):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(4, num_rows, generator=generator, dtype=torch.float64)
    length = num_rows // num_responses
    index = torch.arange(num_rows)
    return SignalTable(
        disagreement=10 * draws[0],
        compatibility=draws[1],
        entropy=3 * draws[2],
        completion=index // length,
        position=index % length,
        valid=draws[3] >= masked,
        extra=further_signals(num_rows, seed),
    )


coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 3.0])
"""Few values, so that ties are the rule."""


@st.composite
def tables(draw, min_valid=0):
    rows = []
    for completion in range(draw(st.integers(1, 4))):
        for position in range(draw(st.integers(0, 7))):
            values = tuple(draw(coarse) for _ in range(3))
            rows.append((*values, completion, position, draw(st.booleans())))
    if sum(row[-1] for row in rows) < min_valid:
        rows.append((1.0, 0.5, 0.5, 9, 0, True))
    return table_of(rows)


budgets = st.sampled_from([0.01, 0.05, 0.07, 0.3, 0.55, 0.99, 1.0])
