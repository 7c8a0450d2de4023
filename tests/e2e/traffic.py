"""Counts the bytes that a trainer hands to collectives, by what they are for and which collective it is."""

from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that this rank gives to `c10d` operations; `found` is {purpose: {name: bytes}}.

    Args:
        trainer: its `_select` is the purpose "select"; all else is "other".
    """

    def __init__(self, trainer) -> None:
        super().__init__()
        self._purpose = "other"
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        select = trainer._select

        def watched(*args, **kwargs):
            self._purpose = "select"
            try:
                return select(*args, **kwargs)
            finally:
                self._purpose = "other"

        trainer._select = watched

    @property
    def found(self) -> dict[str, dict[str, int]]:
        return {purpose: dict(counts) for purpose, counts in self._counts.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self._counts[self._purpose][name] += sum(t.numel() * t.element_size() for t in tensors)
            self._counts[self._purpose][name + "#"] += 1
        return func(*args, **(kwargs or {}))
