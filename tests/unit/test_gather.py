"""How rows travel between ranks. Oracle: the table that was packed; the real collectives are in e2e."""

import pytest
import torch

from taopd.trainer.gather import _packed, _unpacked
from tests.unit.selector_tables import random_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_come_back_as_they_were(dtype):
    table = random_table(50, 5, seed=3)
    values = [table.disagreement.float().double(), table.compatibility, table.entropy]
    dtypes = [dtype if index == 0 else torch.float64 for index in range(3)]
    rows = _packed(table, [value.to(kind) for value, kind in zip(values, dtypes, strict=True)])
    assert rows.dtype == torch.uint8
    assert rows.shape == (50, 8 + dtype.itemsize + 16)
    found = _unpacked(rows, [], dtypes)
    for name in ("completion", "position", "valid", "compatibility", "entropy"):
        assert torch.equal(getattr(found, name), getattr(table, name)), name
    assert torch.equal(found.disagreement, values[0])


def test_numbers_at_the_ends_of_their_ranges():
    table = random_table(2, 2)
    table.completion[:] = torch.tensor([0, 2**31 - 1])
    table.position[:] = torch.tensor([2**31 - 1, 0])
    found = _unpacked(_packed(table, [table.entropy] * 3), [], [torch.float64] * 3)
    assert torch.equal(found.completion, table.completion)
    assert torch.equal(found.position, table.position)
