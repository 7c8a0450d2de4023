"""Forward and backward at selected positions: the gradient window."""

from taopd.sparse.backbone import SparseStates, sparse_states
from taopd.sparse.fidelity import Fidelity, gradient_fidelity
from taopd.sparse.positions import gradient_positions
from taopd.sparse.prefix import (
    KeyValuePrefix,
    backbone_of,
    capture_prefix,
    check_backbone,
    gather_prefix,
)

__all__ = [
    "Fidelity",
    "KeyValuePrefix",
    "SparseStates",
    "backbone_of",
    "capture_prefix",
    "check_backbone",
    "gather_prefix",
    "gradient_fidelity",
    "gradient_positions",
    "sparse_states",
]
