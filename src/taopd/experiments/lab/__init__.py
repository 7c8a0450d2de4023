"""The tiny lab: a teacher, a student and a task small enough for two CPU cores, trained on first use.

The task is addition: the learnable and the incompatible disagreement are known by construction.
Why not a downloaded model: nothing to license, and every position's kind is known.
The rest of the package sees a lab as folders and a parquet file, like any user's.
Source: design A ("carry and dialect addition") of this project's survey of synthetic tasks.
"""

from taopd.experiments.lab.build import Lab, build_lab, default_root
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.lab.task import VARIANTS, TokenKind, Variant, is_correct, token_kind
from taopd.experiments.lab.tokenizer import build_tokenizer, token_kinds

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
