"""`TeachabilityTrainer`: its settings, one file per stage of a step, and folders for what is around it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig
    from taopd.trainer.trainer import TeachabilityTrainer

__all__ = ["TeachabilityConfig", "TeachabilityTrainer"]

_HOME = {
    "TeachabilityConfig": "taopd.trainer.config",
    "TeachabilityTrainer": "taopd.trainer.trainer",
}


# Lazily: the package's parts are read by commands that must not load TRL.
def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'taopd.trainer' has no attribute {name!r}")
