"""Which weights are kept of the initial student, to compare a resumed run's."""

import pytest

from taopd.trainer.checkpoint.same_start import SAMPLES, places


@pytest.mark.parametrize("length", [0, 1, 2, SAMPLES, 1000, 2**24 + 1, 49152 * 576, 151936 * 4096])
def test_places_lie_within_a_parameter_of_any_size(length):
    found = places(length).tolist()
    assert len(found) == min(SAMPLES, length) == len(set(found))
    if length:
        assert found[0] == 0 and found == sorted(found)
        assert found[-1] == (length - 1 if length > 1 else 0)
