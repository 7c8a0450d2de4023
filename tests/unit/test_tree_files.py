"""Nested state in one safetensors file. Oracles: what was written; damage ends in one kind of error."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from scripts.fuzz.odd import Choices, changed, torn
from taopd.errors import DataError
from taopd.trainer.checkpoint.state_file import Shard, load_tree, save_tree

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.lists(st.integers(-9, 9), max_size=4).map(torch.tensor)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(deadline=None)
@given(tree=TREES)
def test_what_is_read_is_what_was_written(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "x.safetensors"
    save_tree(path, tree)
    assert same(load_tree(path), tree)


def test_views_of_one_memory_are_saved_apart(tmp_path):
    whole = torch.arange(6.0)
    tree = {"whole": whole, "part": whole[2:4], "across": whole.reshape(2, 3).T}
    save_tree(tmp_path / "x", tree)
    assert same(load_tree(tmp_path / "x"), tree)


def test_a_block_knows_its_place(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    save_tree(tmp_path / "x", [Shard(values, (5, 3), (3, 0), (2, 3))])
    (whole,) = load_tree(tmp_path / "x")
    (bare,) = load_tree(tmp_path / "x", shard_values=False)
    assert torch.equal(whole.values, values) and bare.values is None
    assert (whole.shape, whole.start, whole.size) == ((5, 3), (3, 0), (2, 3))
    assert (bare.shape, bare.start, bare.size) == ((5, 3), (3, 0), (2, 3))


@pytest.mark.parametrize(
    "value",
    [object(), {(1, 2): 3}, {"x": {1.5: 0}}, {1, 2}],
    ids=["object", "tuple as key", "float as key", "set"],
)
def test_what_only_a_pickle_could_hold_is_refused(value, tmp_path):
    with pytest.raises(DataError, match="without pickle"):
        save_tree(tmp_path / "x", value)


TREE = {"a": torch.ones(2, 3), "b": [1, (None, "x")], "c": Shard(torch.ones(2), (4,), (2,), (2,))}


@pytest.mark.parametrize("seed", range(60))
def test_damage_ends_in_one_message(seed, tmp_path):
    """Bytes that are torn, and structures that no tree has in a file that is sound."""
    path, source = tmp_path / "x.safetensors", random.Random(seed)
    save_tree(path, TREE)
    if seed % 2:
        path.write_bytes(torn(path.read_bytes(), Choices(source.randbytes(64))))
    else:
        skeleton = {"dict": [["a", {"tensor": "0"}], ["c", {"block": ["1", [4], [2]]}]]}
        skeleton = changed(skeleton, Choices(source.randbytes(64)))
        metadata = {"taopd_tree": json.dumps(skeleton, default=str)}
        save_file({"0": torch.ones(2, 3), "1": torch.ones(2)}, path, metadata=metadata)
    for shard_values in (True, False):
        try:
            load_tree(path, shard_values=shard_values)
        except DataError as error:
            assert str(path) in str(error)
