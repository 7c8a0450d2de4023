"""taopd: on-policy distillation that trains only on the tokens that teach.

    from taopd import TeachabilityConfig, TeachabilityTrainer

takes the place of `trl.DistillationConfig` and `trl.DistillationTrainer`. Everything below the trainer is
plain torch: `taopd.signals`, `taopd.selectors`, `taopd.losses`, `taopd.kernels`. Names are imported on
first use, so that `import taopd` costs nothing.

Source of the method: "Not All Disagreement Is Learnable: Token Teachability in On-Policy Distillation",
arXiv 2605.26844.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taopd.diagnose.bank import FixedContextBank
    from taopd.experiments.lab import build_lab
    from taopd.models.prompts import load_prompts
    from taopd.preflight.of_trainer import check
    from taopd.selectors import SELECTORS, register_selector, select
    from taopd.trainer import TeachabilityConfig, TeachabilityTrainer

__version__ = "0.2.0"

# The libraries below report every trainer and every data set to their makers, unless they are told otherwise
# before they are imported. A caller's own setting stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

_HOME = {
    "FixedContextBank": "taopd.diagnose.bank",
    "SELECTORS": "taopd.selectors",
    "TeachabilityConfig": "taopd.trainer.config",
    "TeachabilityTrainer": "taopd.trainer.trainer",
    "build_lab": "taopd.experiments.lab",
    "check": "taopd.preflight.of_trainer",
    "load_prompts": "taopd.models.prompts",
    "register_selector": "taopd.selectors",
    "select": "taopd.selectors",
}
_MOVED = {
    "taopd.choose": "taopd.trainer.selection",
    "taopd.data": "taopd.models.prompts",
    "taopd.live": "taopd.trainer.tracker_tables",
    "taopd.metrics": "taopd.trainer.metrics",
    "taopd.tinylab": "taopd.experiments.lab",
    "taopd.tree_files": "taopd.trainer.checkpoint.state_file",
}
"""Import paths that the documentation of 0.1 named, and where they are now."""

__all__ = [
    "SELECTORS",
    "FixedContextBank",
    "TeachabilityConfig",
    "TeachabilityTrainer",
    "__version__",
    "build_lab",
    "check",
    "load_prompts",
    "register_selector",
    "select",
]


class _Moved(ModuleType):
    """An old import path: every name of it is looked up in the module that took its place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(
            "__"
        ):  # inspect asks every module for its file: that must import nothing.
            raise AttributeError(name)
        return getattr(import_module(_MOVED[self.__name__]), name)


sys.modules.update({old: _Moved(old) for old in _MOVED})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if f"taopd.{name}" in _MOVED:
        return sys.modules[f"taopd.{name}"]
    raise AttributeError(f"module 'taopd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
