"""Forward and backward at selected positions: the gradient window."""

from taopd.models.gradient_window.fidelity import compare_gradients, gradients_of
from taopd.models.gradient_window.positions import gradient_positions
from taopd.models.gradient_window.prefix import (
    KeyValuePrefix,
    backbone_of,
    capture_prefix,
    check_backbone,
    gather_prefix,
)
from taopd.models.gradient_window.sparse_forward import sparse_states

__all__ = [
    "KeyValuePrefix",
    "backbone_of",
    "capture_prefix",
    "check_backbone",
    "compare_gradients",
    "gather_prefix",
    "gradient_positions",
    "gradients_of",
    "sparse_states",
]
