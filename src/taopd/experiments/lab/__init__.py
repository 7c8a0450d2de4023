"""The tiny lab: a teacher, a student and a task small enough for two CPU cores, trained on first use.

The task is addition: the learnable and the incompatible disagreement are known by construction.
Why not a downloaded model: nothing to license, and every position's kind is known.
The rest of the package sees a lab as folders and a parquet file, like any user's.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taopd.experiments.lab.build import Lab, build_lab, default_root
    from taopd.experiments.lab.spec import LabSpec
    from taopd.experiments.lab.task import TokenKind, is_correct, token_kind
    from taopd.experiments.lab.tokenizer import build_tokenizer, token_kinds
    from taopd.experiments.lab.variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "Lab",
    "LabSpec",
    "TokenKind",
    "Variant",
    "build_lab",
    "build_tokenizer",
    "default_root",
    "is_correct",
    "token_kind",
    "token_kinds",
]

_HOME = {
    **dict.fromkeys(("Lab", "build_lab", "default_root"), "build"),
    "LabSpec": "spec",
    **dict.fromkeys(("TokenKind", "is_correct", "token_kind"), "task"),
    **dict.fromkeys(("build_tokenizer", "token_kinds"), "tokenizer"),
    **dict.fromkeys(("VARIANTS", "Variant"), "variants"),
}


# Lazily: a lab that is built is found without torch, whose import takes seconds.
def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
