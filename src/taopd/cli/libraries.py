"""Libraries are loaded without a search for garbage: a fifth less time for torch, transformers and TRL."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from taopd.runs.heartbeat import HEAVY


@contextmanager
def while_loading() -> Iterator[None]:
    """A block that imports a command's libraries; nothing where they are loaded already.

    What modules make stays until the process ends. Python's collector would look at all of it again and again
    while it grows, and once more at every full collection of the run: afterwards it lies outside its view.
    Objects are freed as ever when nobody refers to them.
    """
    # In a process that has done other work, its garbage would lie there too, and stay.
    if not gc.isenabled() or any(name in sys.modules for name in HEAVY):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
