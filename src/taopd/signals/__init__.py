"""Signals: what student and teacher say about every completion position."""

from taopd.signals.tables import (
    COMPATIBILITIES,
    SignalTable,
    TokenSignals,
    compatibility_proxy,
    prefix_ema,
    signal_table,
)

__all__ = [
    "COMPATIBILITIES",
    "SignalTable",
    "TokenSignals",
    "compatibility_proxy",
    "prefix_ema",
    "signal_table",
]
