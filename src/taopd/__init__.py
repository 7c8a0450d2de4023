"""taopd: on-policy distillation that trains only on the tokens that teach.

    from taopd import TeachabilityConfig, TeachabilityTrainer

takes the place of `trl.DistillationConfig` and `trl.DistillationTrainer`. Everything below the trainer is
plain torch: `taopd.signals`, `taopd.selectors`, `taopd.losses`, `taopd.kernels`. Names are imported on
first use, so that `import taopd` costs nothing.

Source of the method: "Not All Disagreement Is Learnable: Token Teachability in On-Policy Distillation",
arXiv 2605.26844.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taopd.diagnose.bank import FixedContextBank
    from taopd.selectors import SELECTORS, register_selector, select
    from taopd.trainer.config import TeachabilityConfig
    from taopd.trainer.trainer import TeachabilityTrainer

__version__ = "0.1.0"

# The libraries below report every trainer and every data set to their makers, unless they are told otherwise
# before they are imported. A caller's own setting stays.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

_HOME = {
    "FixedContextBank": "taopd.diagnose.bank",
    "SELECTORS": "taopd.selectors",
    "TeachabilityConfig": "taopd.trainer.config",
    "TeachabilityTrainer": "taopd.trainer.trainer",
    "register_selector": "taopd.selectors",
    "select": "taopd.selectors",
}

__all__ = [
    "SELECTORS",
    "FixedContextBank",
    "TeachabilityConfig",
    "TeachabilityTrainer",
    "__version__",
    "register_selector",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'taopd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
