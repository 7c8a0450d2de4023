"""Ctrl-C and SIGTERM held back: while the optimizer updates the weights, or until all processes agree."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator

_HELD = (signal.SIGINT, signal.SIGTERM)
_INSISTED = 3
"""Signals after which a process waits for the others no more: a terminal sends one, its launcher another."""


class DeferredSignals:
    """Holds signals back between `hold` and `release`, which raises each of them once.

    An interrupt in the middle of an update would leave weights of no step: nothing could be saved, and every
    step since the last checkpoint would be lost. Outside the main thread Python gets no signals, and this
    does nothing.

    One process of several cannot save alone: after `keep` signals wait for `agreed`, which all processes call
    at the end of a step.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: list[int] = []
        self._kept = False

    def hold(self) -> None:
        """From here on a signal waits."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in _HELD:
            # None: a handler that was not set from Python and could not be put back.
            if (before := signal.getsignal(number)) is not None:
                self._before[number] = before
                signal.signal(number, self._note)

    def keep(self) -> None:
        """Hold, whatever calls `release`, to the `end`."""
        self._kept = True
        self.hold()

    def release(self) -> None:
        """Restore the handlers and raise the signals that came; after `keep` nothing."""
        if not self._kept:
            self.end()

    def end(self, number: int = 0) -> None:
        """Restore the handlers and raise the signals that came, or the one that the processes agreed on."""
        self._kept = False
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
        came, self._came = self._came, []
        for each in [number] if number else dict.fromkeys(came):
            signal.raise_signal(each)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that came to any of the processes, 0 for none; collective."""
        flags = torch.tensor([float(each in self._came) for each in _HELD]).to(accelerator.device)
        found = accelerator.reduce(flags, reduction="sum").tolist()
        # A scheduler's has a code of its own for what started the run.
        return max((int(each) for each, sent in zip(_HELD, found, strict=True) if sent), default=0)

    def _note(self, number: int, frame: Any) -> None:
        self._came.append(number)
        if self._kept and len(self._came) >= _INSISTED:
            self.end(number)
