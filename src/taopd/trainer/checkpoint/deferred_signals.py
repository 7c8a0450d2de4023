"""Ctrl-C and SIGTERM held back for as long as the optimizer updates the weights."""

import signal
import threading
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """Holds signals back between `hold` and `release`, which raises each of them once.

    An interrupt in the middle of an update would leave weights of no step: nothing could be saved, and every
    step since the last checkpoint would be lost. Outside the main thread Python gets no signals, and this
    does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: list[int] = []

    def hold(self) -> None:
        """From here on a signal waits."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in _HELD:
            # None: a handler that was not set from Python and could not be put back.
            if (before := signal.getsignal(number)) is not None:
                self._before[number] = before
                signal.signal(number, self._note)

    def release(self) -> None:
        """Restore the handlers and raise the signals that came."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        came, self._came = self._came, []
        for number in dict.fromkeys(came):
            signal.raise_signal(number)

    def _note(self, number: int, frame: Any) -> None:
        self._came.append(number)
